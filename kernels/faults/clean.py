"""Clean variants: correct kernels that round differently. Whoever calls one of them broken is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import AttentionPath, Call, Shape
from verify.kernels.eager import EagerKernel
from verify.kernels.faults.record import Variant
from verify.kernels.faults.tile_kernel import State, TileKernel, TileRow
from verify.kernels.kernel import Kernel
from verify.kernels.merge import Part, merge_tree
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.tile_options import TileOptions


class ReversedTiles(TileKernel):
    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        return super().tiles(start, stop)[::-1]

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return replace(super().arithmetic(shape, path), tile_order="backward")


class ReversedParts(TileKernel):
    def part_bounds(self, cuts: tuple[int, ...]) -> list[tuple[int, int]]:
        return super().part_bounds(cuts)[::-1]


class TreeMerge(TileKernel):
    def merge(self, parts: list[Part]) -> Part:
        return merge_tree(parts)


class Exp2(TileKernel):
    def exp(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp2(x * (1 / math.log(2.0)))


class ScaledQuery(TileKernel):
    """q is multiplied by scale * log2 e and rounded to float16 before the product."""

    def query(self, call: Call, b: int, t: torch.Tensor) -> torch.Tensor:
        return (call.q[b, t].float() * (call.scale / math.log(2.0))).half().float()

    def logits(self, row: TileRow, k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("thd,nhd->thn", row.q, k) * math.log(2.0)

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return replace(super().arithmetic(shape, path), u_q=2.0**-11)


class RoundedDenominator(TileKernel):
    """l sums P as it was rounded for the second product."""

    def summed(self, p: torch.Tensor) -> torch.Tensor:
        return p.half().float().sum(-1)

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return replace(super().arithmetic(shape, path), l_from_rounded_p=True)


class HalfParts(TileKernel):
    """Partial results are stored as float16."""

    def stored(self, row: TileRow, parts: list[Part]) -> list[Part]:
        return [Part(part.out.half().float(), part.lse) for part in parts]

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return replace(super().arithmetic(shape, path), u_part=2.0**-11)


class LazyRescale(TileKernel):
    """The maximum is moved only when it grows by more than 8 in base 2, as some kernels save work."""

    lag = 8 * math.log(2.0)  # nats

    def rescaled(self, state: State, m: torch.Tensor) -> None:
        keep = (m - state.m <= self.lag) & ~torch.isneginf(state.m)
        super().rescaled(state, torch.where(keep, state.m, m))

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return replace(super().arithmetic(shape, path), stale_maximum=True)


class MaximumOffset(TileKernel):
    """A constant is added to the maximum, so that P stays small: exp(s - m - offset).

    llama.cpp's CUDA kernels add 3 * 0.6931 (FATTN_KQ_MAX_OFFSET), which is not ln 8: the largest P is
    0.1250177, 0.125 in float16, while l sums it as it was.
    """

    offset = 3 * 0.6931

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return replace(super().arithmetic(shape, path), p_shift=self.offset)


class LargerOffset(MaximumOffset):
    """An offset of 3 nats."""

    offset = 3.0


class OffsetEightfold(MaximumOffset):
    """An offset of ln 8: the largest P is nearly a power of two, as nearly as s - (m + offset) is."""

    offset = 3 * math.log(2.0)


class CompensatedSum(TileKernel):
    """l in float64."""

    def summed(self, p: torch.Tensor) -> torch.Tensor:
        return p.double().sum(-1).float()


def _tile(name: str, kind: type[TileKernel] = TileKernel, **options: object) -> Callable[[], Kernel]:
    return lambda: kind(name, **options)  # type: ignore[arg-type]


def _eager(name: str, **options: object) -> Callable[[], Kernel]:
    return lambda: EagerKernel(name, TileOptions(**options))  # type: ignore[arg-type]


VARIANTS: tuple[Variant, ...] = (
    Variant("plain", "one part, tiles of 64 keys", _tile("plain")),
    Variant("tiles of 16", "smaller tiles", _tile("tiles of 16", block=16)),
    Variant("tiles of 128", "larger tiles", _tile("tiles of 128", block=128)),
    Variant("3 parts", "the KV range cut in three", _tile("3 parts", kv=3)),
    Variant("8 parts", "the KV range cut in eight", _tile("8 parts", kv=8, block=16)),
    Variant("heads 4+2", "two head groups", _tile("heads 4+2", heads=(4, 2), kv=2)),
    Variant("bf16 P", "P rounded to bfloat16", _tile("bf16 P", p="bf16", kv=2)),
    Variant("f32 P", "P not rounded", _tile("f32 P", p="f32", kv=2)),
    Variant("f16 output", "the result rounded to float16", _tile("f16 output", out="f16")),
    Variant("bf16 output", "the result rounded to bfloat16", _tile("bf16 output", out="bf16")),
    Variant("f16 accumulator", "declared, and so charged to its own budget",
            _tile("f16 accumulator", acc="f16"), without=("near-overflow",)),
    Variant("reversed tiles", "newest keys first", _tile("reversed tiles", ReversedTiles)),
    Variant("reversed parts", "parts merged from the last", _tile("reversed parts", ReversedParts, kv=3)),
    Variant("tree merge", "parts merged in pairs", _tile("tree merge", TreeMerge, kv=5, block=32)),
    Variant("exp2", "exp(x) as 2^(x log2 e)", _tile("exp2", Exp2, kv=2)),
    Variant("scaled q", "q pre-scaled and rounded to float16", _tile("scaled q", ScaledQuery)),
    Variant("l of rounded P", "the denominator sums rounded P", _tile("l of rounded P", RoundedDenominator)),
    Variant("f16 parts", "partial results stored as float16", _tile("f16 parts", HalfParts, kv=3)),
    Variant("lazy rescale", "the maximum moves in steps of 8 octaves", _tile("lazy rescale", LazyRescale)),
    Variant("lazy rescale, f16 output", "the same, with a result in float16",
            _tile("lazy rescale, f16 output", LazyRescale, out="f16", kv=2)),
    Variant("offset 3 x 0.6931", "llama.cpp's offset on the maximum, sums in float32",
            _tile("offset 3 x 0.6931", MaximumOffset)),
    Variant("offset 3 x 0.6931, f16 sums", "the same with float16 sums, as its MMA kernel has them",
            _tile("offset 3 x 0.6931, f16 sums", MaximumOffset, acc="f16", kv=2),
            without=("near-overflow",)),
    Variant("offset 3", "an offset of 3 nats", _tile("offset 3", LargerOffset, kv=2)),
    Variant("offset ln 8", "an offset by which the largest P is nearly exact",
            _tile("offset ln 8", OffsetEightfold)),
    Variant("l in float64", "a more exact denominator", _tile("l in float64", CompensatedSum, kv=3)),
    Variant("eager", "the project's own `eager`, three parts",
            _eager("eager", plan=Plan(kv=KVCuts("parts", 3)))),
)  # fmt: skip
