"""Known faults of attention kernels, and clean variants that only round differently.

A fault is a correct kernel (`tile_kernel`) with one step broken, with the bug report it was learnt from; a
clean variant is the same kernel with other tiles, cuts, types or orders of summation. Detectors are judged by
both: they must see every fault and no variant. A fault is declared where its code is (`record.fault`).
"""

from verify.kernels.faults.caches import CACHE_FAULTS
from verify.kernels.faults.clean import VARIANTS
from verify.kernels.faults.plans import PLAN_FAULTS
from verify.kernels.faults.record import CacheFault, Fault, PlanFault, Variant, declared

# Importing a module of faults declares them. In the order in which they are listed.
from verify.kernels.faults import merging, keys, heads, softmax, rounding, dispatch, forms  # isort: skip

FAULTS: tuple[Fault, ...] = tuple(declared)

__all__ = [
    "CACHE_FAULTS",
    "FAULTS",
    "PLAN_FAULTS",
    "VARIANTS",
    "CacheFault",
    "Fault",
    "PlanFault",
    "Variant",
]

del merging, keys, heads, softmax, rounding, dispatch, forms
