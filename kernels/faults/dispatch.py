"""Faults of what is chosen to run.

Each class breaks one step of `TileKernel`, and says where it was seen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from verify.kernels.call import Call, Result, Shape
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


@fault(
    "first call's lengths",
    "calls of the same shapes are as long as the first of them was",
    "llama.cpp #21640",
    "FlashInfer #1968",
)
class FirstCallsLengths(TileKernel):
    """A captured graph is replayed with the lengths that it was captured with."""

    def __init__(self, spec: str, **options: Any) -> None:
        super().__init__(spec, **options)
        self._captured: dict[Shape, torch.Tensor] = {}

    def run(self, call: Call) -> Result:
        kept = self._captured.setdefault(call.shape, call.kv_len.clone())
        return super().run(replace(call, kv_len=kept))


@fault("other head size", "only head size 64 is right", "ik #1452")
class OtherHeadSize(TileKernel):
    """Right for a head size of 64, a key too few for all others."""

    def visible(self, call: Call, n_kv: int) -> int:
        return n_kv if call.shape.k_size == 64 else max(n_kv - 1, min(n_kv, 1))
