"""A user's package, whose files import one another by relative names. Imports nothing of ours."""
