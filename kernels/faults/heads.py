"""Faults of which heads read which, and write which columns.

Each class breaks one step of `TileKernel`, and says where it was seen.
"""

from __future__ import annotations

import torch

from verify.kernels.call import Call, Shape
from verify.kernels.faults.record import fault
from verify.kernels.faults.tile_kernel import TileKernel, TileRow
from verify.kernels.merge import Part


@fault("heads interleaved", "query head h reads KV head h % Hkv", "llama.cpp #19092")
class HeadsInterleaved(TileKernel):
    def kv_heads(self, shape: Shape, groups: tuple[int, ...]) -> torch.Tensor:
        return torch.arange(shape.q_heads) % shape.kv_heads


@fault(
    "group does not divide",
    "query head h reads KV head h // group",
    "llama.cpp #19092",
    "llama.cpp #19115",
    heads=(4, 2),
)
class GroupDoesNotDivide(TileKernel):
    """Query head h reads KV head h // g with g the first group's size."""

    def kv_heads(self, shape: Shape, groups: tuple[int, ...]) -> torch.Tensor:
        return (torch.arange(shape.q_heads) // groups[0]).clamp(max=shape.kv_heads - 1)


@fault("second group's query", "the second head group reads the first group's q", heads=(4, 2))
class SecondGroupsQuery(TileKernel):
    def query(self, call: Call, b: int, t: torch.Tensor) -> torch.Tensor:
        q = super().query(call, b, t)
        groups, r = self.plan.groups(call.shape.ratio), call.shape.ratio
        heads = torch.arange(call.shape.q_heads)
        inside = heads % r
        return q[:, torch.where(inside >= groups[0], heads - groups[0], heads)]


@fault("second group's sinks", "the second head group takes the first group's sinks", heads=(4, 2))
class SinkOfFirstGroup(TileKernel):
    def sink(self, row: TileRow) -> torch.Tensor:
        heads, r = torch.arange(row.call.shape.q_heads), row.call.shape.ratio
        first = self.plan.groups(r)[0]
        return super().sink(row)[torch.where(heads % r >= first, heads - first, heads)]


@fault("last columns", "the last columns of one head are not written", "llama.cpp #17089")
class LastColumns(TileKernel):
    """The last 16 columns of V are not written for the last query head of each KV head."""

    def store(self, result: Part) -> Part:
        out = result.out.clone()
        out[..., -1, -16:] = 0
        return super().store(Part(out, result.lse))
