"""Kernels that only look right, a way each, as `verify judge` is given them. They import nothing of ours."""
