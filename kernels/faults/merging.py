"""Faults of partial results and their merge, empty parts and rows, and the returned lse.

Each class breaks one step of `TileKernel`, and says where it was seen.
"""

from __future__ import annotations

import math

import torch

from verify.kernels.faults.record import fault
from verify.kernels.faults.tile_kernel import State, TileKernel, TileRow
from verify.kernels.merge import Part, merge_sequential


@fault(
    "base-2 merge",
    "merge weights from a base-2 lse read as base e",
    "SGLang #40903",
    "SGLang #35045",
    "FlashInfer #2113",
    "vLLM #47079",
    kv=3,
)
class Base2Merge(TileKernel):
    """The lse is in base 2, the merge takes it as natural."""

    def stored(self, row: TileRow, parts: list[Part]) -> list[Part]:
        return [Part(part.out, part.lse / math.log(2.0)) for part in parts]

    def merge(self, parts: list[Part]) -> Part:
        result = merge_sequential(parts)
        return Part(result.out, result.lse * math.log(2.0))


@fault("base-2 lse", "the returned lse is in base 2", "FlashInfer #2113")
class Base2Lse(TileKernel):
    def store(self, result: Part) -> Part:
        return super().store(Part(result.out, result.lse / math.log(2.0)))


@fault("mean of parts", "parts are averaged without weights", kv=3)
class MeanOfParts(TileKernel):
    def merge(self, parts: list[Part]) -> Part:
        return Part(torch.stack([part.out for part in parts]).mean(0), merge_sequential(parts).lse)


@fault("last part lost", "parts beyond a power of two are not merged", kv=3)
class LastPartLost(TileKernel):
    """The merge rounds the number of parts down to a power of two."""

    def merge(self, parts: list[Part]) -> Part:
        return super().merge(parts[: 1 << (len(parts).bit_length() - 1)])


@fault("no common maximum", "merge weights overflow or underflow", "vLLM #49294", kv=3)
class NoCommonMaximum(TileKernel):
    """Merge weights exp(lse) instead of exp(lse - max lse)."""

    def merge(self, parts: list[Part]) -> Part:
        weights = torch.stack([torch.exp(part.lse) for part in parts])
        total = weights.sum(0)
        out = sum(w[..., None] * part.out for w, part in zip(weights, parts, strict=True)) / total[..., None]
        return Part(torch.as_tensor(out), torch.log(total))


@fault("weights in 16 bits", "merge weights are rounded to 16 bits", kv=3)
class WeightsIn16Bits(TileKernel):
    """Weights over the maximum as bfloat16: what they lose is below the rounding of P on most inputs."""

    def merge(self, parts: list[Part]) -> Part:
        merged = merge_sequential(parts)
        top = torch.stack([part.lse for part in parts]).amax(0)
        shift = torch.where(torch.isneginf(top), 0.0, top)
        weights = [torch.exp(part.lse - shift).bfloat16().float() for part in parts]
        total = torch.stack(weights).sum(0)
        out = torch.stack([w[..., None] * part.out for w, part in zip(weights, parts, strict=True)]).sum(0)
        return Part(out / torch.where(total == 0, 1.0, total)[..., None], merged.lse)


@fault("lse in another order", "the merge reads the lse of the head beside", "vllm flash-attention #87",
       "vLLM #22003", kv=3)  # fmt: skip
class LseInAnotherOrder(TileKernel):
    """The lse of partial results lies in another order than the merge takes it for."""

    def merge(self, parts: list[Part]) -> Part:
        turned = [Part(part.out, part.lse.roll(1, -1) if part.lse.dim() else part.lse) for part in parts]
        return Part(merge_sequential(turned).out, merge_sequential(parts).lse)


@fault("fix-up columns", "the stream-k fix-up writes the wrong columns", "llama.cpp #17089", kv=3)
class FixUpColumns(TileKernel):
    """The fix-up of the last part writes its columns 16 further on."""

    def stored(self, row: TileRow, parts: list[Part]) -> list[Part]:
        if len(parts) > 1:
            parts[-1] = Part(parts[-1].out.roll(16, -1), parts[-1].lse)
        return parts


@fault(
    "part of other batch",
    "the combine kernel's stride over the batch is wrong",
    "FlagGems #5235",
    "FlagGems #5236",
    "vllm flash-attention #176",
    kv=3,
)
class PartOfOtherBatch(TileKernel):
    """Partial results are found by a stride that leaves the sequence out of account."""

    def __init__(self, spec: str, *, kv: int) -> None:
        super().__init__(spec, kv=kv)
        self.kept: dict[int, Part] = {}

    def stored(self, row: TileRow, parts: list[Part]) -> list[Part]:
        if len(parts) > 1:
            # Sequences may have rows of other lengths, which no other's lie beside.
            other = self.kept.get(row.n)
            if row.b and other is not None and other.out.shape == parts[0].out.shape:
                parts[0] = other
            self.kept[row.n] = parts[0]
        return parts


@fault(
    "empty part NaN",
    "a part that sees no key gives NaN",
    "FlashInfer #4051",
    "vLLM #28181",
    "PyTorch #103749",
    "PyTorch #110213",
    kv=3,
)
class EmptyPartNaN(TileKernel):
    """A part with no visible key is 0 / 0."""

    def closed(self, state: State) -> Part:
        return Part(state.a / state.l[..., None], state.m + torch.log(state.l))


@fault("empty part finite", "a part that sees no key has a finite lse", "vLLM #28181", "vLLM #49294", kv=3)
class EmptyPartFinite(TileKernel):
    """A part with no visible key has lse 0: it weighs as much as a key."""

    def closed(self, state: State) -> Part:
        part = super().closed(state)
        return Part(part.out, torch.where(torch.isneginf(part.lse), 0.0, part.lse))

    def no_part(self, row: TileRow) -> Part:
        return super().closed(self.begin(row))


@fault("empty row +inf", "an empty row has lse +inf", "vLLM #49294")
class EmptyRowPlusInf(TileKernel):
    """A row with no visible key has lse +inf."""

    def no_part(self, row: TileRow) -> Part:
        part = super().no_part(row)
        return Part(part.out, -part.lse)


@fault("empty row NaN", "an empty row gives NaN", "PyTorch #103749", "PyTorch #110213")
class EmptyRowNaN(TileKernel):
    """A row with no visible key is 0 / 0."""

    def no_part(self, row: TileRow) -> Part:
        part = super().no_part(row)
        return Part(part.out * math.nan, part.lse)


@fault("race", "blocks race: now and then a part is merged before it is written", "ik #1104", kv=3)
class Race(TileKernel):
    """Now and then the merge runs before the last part is written."""

    def __init__(self, spec: str, *, kv: int) -> None:
        super().__init__(spec, kv=kv)
        self.generator = torch.Generator().manual_seed(7)

    def stored(self, row: TileRow, parts: list[Part]) -> list[Part]:
        if len(parts) > 1:
            # Drawn on the host: the same rows on every device.
            written = (torch.rand(row.q.shape[:2], generator=self.generator) >= 0.05).to(row.q.device)
            parts[-1] = Part(parts[-1].out * written[..., None], parts[-1].lse)
        return parts
