"""Faults of the running softmax, softcap, ALiBi and sinks.

Each class breaks one step of `TileKernel`, and says where it was seen.
"""

from __future__ import annotations

import torch

from verify.kernels.faults.record import fault
from verify.kernels.faults.tile_kernel import State, TileKernel, TileRow
from verify.kernels.merge import Part


@fault("accumulator not rescaled", "a is not rescaled when the maximum moves")
class NoRescaleOfA(TileKernel):
    def rescaled(self, state: State, m: torch.Tensor) -> None:
        a, moved = state.a, ~torch.isneginf(state.m)
        super().rescaled(state, m)
        state.a = torch.where(moved[..., None], a, state.a)


@fault("denominator not rescaled", "l is not rescaled when the maximum moves")
class NoRescaleOfL(TileKernel):
    def rescaled(self, state: State, m: torch.Tensor) -> None:
        l, moved = state.l, ~torch.isneginf(state.m)
        super().rescaled(state, m)
        state.l = torch.where(moved, l, state.l)


@fault("late maximum", "the maximum is not updated in the last tile")
class LateMaximum(TileKernel):
    """The maximum is not updated in a row's last tile: P is relative to the one before and may overflow."""

    def update(self, state: State, s: torch.Tensor, v: torch.Tensor) -> None:
        if s.shape[-1] < self.plan.block and not bool(torch.isneginf(state.m).any()):
            p = torch.exp(s - state.m[..., None])
            state.l = state.l + p.sum(-1)
            state.a = self.accumulate(state.a, p.half().float(), v)
            return
        super().update(state, s, v)


@fault("softcap dropped", "softcap is not applied on the fast path", "ik #1183")
class SoftcapDropped(TileKernel):
    def cap(self, row: TileRow, s: torch.Tensor) -> torch.Tensor:
        return s


@fault("ALiBi dropped", "ALiBi is not applied on the fast path", "ik #1183")
class AlibiDropped(TileKernel):
    def bias(self, row: TileRow, s: torch.Tensor, first: int) -> torch.Tensor:
        return s


@fault("sinks dropped", "sinks are never applied", "ik #2087")
class SinksDropped(TileKernel):
    def with_sink(self, row: TileRow, parts: list[Part]) -> list[Part]:
        return parts or super().with_sink(row, parts)


@fault("sink in every part", "the sink is counted once a part", kv=3)
class SinkInEveryPart(TileKernel):
    def with_sink(self, row: TileRow, parts: list[Part]) -> list[Part]:
        sink = super().with_sink(row, [])
        return parts + sink * max(len(parts), 1)
