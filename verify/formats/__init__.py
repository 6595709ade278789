"""Files of other tools, read and written: the logits files and the logs of llama.cpp and ik_llama.cpp."""
