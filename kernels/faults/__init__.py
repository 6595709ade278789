"""Known faults of attention kernels, and clean variants that only round differently.

A fault is a correct kernel (`tile_kernel`) with one step broken, with the bug report it was learnt from; a
clean variant is the same kernel with other tiles, cuts, types or orders of summation. Detectors are judged by
both: they must see every fault and no variant.
"""

from verify.kernels.faults.clean import VARIANTS
from verify.kernels.faults.corpus import FAULTS
from verify.kernels.faults.record import Fault, Variant

__all__ = ["FAULTS", "VARIANTS", "Fault", "Variant"]
