"""What engines leave: logits files compared, speed logs read, plans predicted, two builds run side by side.

Nothing here loads torch or runs a model of ours; `verify.ppl.engine_logits` sets a run of ours beside them.
"""
