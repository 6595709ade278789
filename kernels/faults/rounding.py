"""Faults of types, accumulators and scales.

Each class breaks one step of `TileKernel`, and says where it was seen.
"""

from __future__ import annotations

import torch

from verify.kernels.faults.record import fault
from verify.kernels.faults.tile_kernel import TileKernel, TileRow, accumulate_f16
from verify.kernels.merge import Part


@fault("f16 overflow", "a float16 accumulator overflows", "llama.cpp #17746", "llama.cpp #18614", "ik #1196")
class F16Overflow(TileKernel):
    """Declared float16 accumulators, but nothing keeps sums of large values below 65504."""

    def __init__(self, spec: str) -> None:
        super().__init__(spec, acc="f16")


@fault("undeclared f16", "decode accumulates in float16, which nobody said", "ik #2144")
class UndeclaredF16(TileKernel):
    """Accumulates in float16 and says float32."""

    def accumulate(self, a: torch.Tensor, p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return accumulate_f16(a, p, v)


@fault("f16 logits", "Q K^T is kept in float16", "llama.cpp #17746")
class F16Logits(TileKernel):
    """Q K^T is accumulated and kept in float16."""

    def logits(self, row: TileRow, k: torch.Tensor) -> torch.Tensor:
        return (torch.einsum("thd,nhd->thn", row.q, k).half() * row.call.scale).float()


@fault("wrong by 2 %", "every result is 2 % too large")
class ScaleOfResult(TileKernel):
    """The result is wrong by one factor."""

    factor = 1.02

    def store(self, result: Part) -> Part:
        return super().store(Part(result.out * self.factor, result.lse))


@fault("wrong by 2e-4", "every result is 0.02 % too large")
class SlightScale(ScaleOfResult):
    """By so little that no single element shows it."""

    factor = 1 + 2e-4


@fault("softmax scale", "the softmax scale is 0.2 % too large")
class ScaleOfValueSize(TileKernel):
    """The softmax scale is off by a thousandth, as one kept in bfloat16 is."""

    def logits(self, row: TileRow, k: torch.Tensor) -> torch.Tensor:
        return super().logits(row, k) * (1 + 2.0**-9)


@fault("wrong cache type", "half of V is read as another type", "ik #1452")
class WrongCacheType(TileKernel):
    """The bits of V are read as another 16-bit type in the second half of the head."""

    def values(self, row: TileRow, first: int, last: int) -> torch.Tensor:
        v = super().values(row, first, last)
        half = v.shape[-1] // 2
        other = v[..., half:].half().view(torch.int16).view(torch.bfloat16).float()
        return torch.cat((v[..., :half], other), -1)


@fault("expanded twice", "the scales of a quantised cache are applied twice", "ik #1206")
class ExpandedTwice(TileKernel):
    """The scales of the cache's blocks of 32 are multiplied in twice."""

    def values(self, row: TileRow, first: int, last: int) -> torch.Tensor:
        v = super().values(row, first, last)
        blocks = v.unflatten(-1, (-1, 16))
        return (blocks * blocks.abs().amax(-1, keepdim=True) / 127).flatten(-2)
