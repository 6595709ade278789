"""`verify judge`: kernels nobody trusts, written by a model or downloaded."""
