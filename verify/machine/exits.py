"""Exit codes of every command that are no verdict's; those are in `verify.judge.verdict`.

Imports nothing: they are also said where an installation is broken.
"""

# Bad input; nothing was measured; interrupted.
EXIT_USAGE, EXIT_VOID, EXIT_INTERRUPTED = 2, 4, 130
# What `verify explain` answers.
EXPLAIN_CODES = {"tie": 0, "not explained": 1, "inconclusive": 3}
