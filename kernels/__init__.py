"""Attention kernels: contract, exact reference, merge algebra, plans, implementations.

Knows no model and no file format. Start with `contract` (what a kernel takes and returns), `exact` (the
oracle), `merge` (how partial results are combined) and `plan` (how one call is cut up).
"""
