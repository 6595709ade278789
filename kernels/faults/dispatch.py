"""Faults of what is chosen to run.

Each class breaks one step of `TileKernel`, and says where it was seen.
"""

from __future__ import annotations

from verify.kernels.call import Call, Shape
from verify.kernels.faults.record import fault
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.plans.plan import KVCuts, Plan, RowPlan


@fault(
    "never ran",
    "the new path never ran: one part and one group did",
    "ik #1973",
    "flash-attention #2901",
    kv=3,
    heads=(4, 2),
)
class NeverRan(TileKernel):
    """A gate that is too narrow sends every call to the old path, one part and one group."""

    def plan_of(self, shape: Shape, n: int) -> RowPlan:
        old = Plan(heads=None, kv=KVCuts("parts", 1), block=self.plan.block)
        return old.at(shape.asked("decode").of_keys(n))


@fault("other head size", "only head size 64 is right", "ik #1452")
class OtherHeadSize(TileKernel):
    """Right for a head size of 64, a key too few for all others."""

    def visible(self, call: Call, n_kv: int) -> int:
        return n_kv if call.shape.k_size == 64 else max(n_kv - 1, min(n_kv, 1))
