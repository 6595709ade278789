"""Faults of what is chosen to run.

Each class breaks one step of `TileKernel`; `corpus` says where it was seen.
"""

from __future__ import annotations

from verify.kernels.call import Call, Shape
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.plans.plan import KVCuts, Plan, RowPlan


class NeverRan(TileKernel):
    """A gate that is too narrow sends every call to the old path, one part and one group."""

    def plan_of(self, shape: Shape, n: int) -> RowPlan:
        old = Plan(heads=None, kv=KVCuts("parts", 1), block=self.plan.block)
        return old.at(n, ratio=shape.ratio, kv_heads=shape.kv_heads, k_size=shape.k_size, v_size=shape.v_size)


class OtherHeadSize(TileKernel):
    """Right for a head size of 64, a key too few for all others."""

    def visible(self, call: Call, n_kv: int) -> int:
        return n_kv if call.shape.k_size == 64 else max(n_kv - 1, min(n_kv, 1))
