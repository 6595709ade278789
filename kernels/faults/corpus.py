"""The corpus of known faults: each class breaks one step of `TileKernel`; `FAULTS` says where it was seen."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from kernels.contract import Call, Kernel, Shape
from kernels.faults.record import Fault
from kernels.faults.tile_kernel import Row, State, TileKernel, accumulate_f16
from kernels.merge import Part, merge_sequential
from kernels.plan import KVCuts, Plan, RowPlan

# Merging


class Base2Merge(TileKernel):
    """The lse is in base 2, the merge takes it as natural."""

    def stored(self, row: Row, parts: list[Part]) -> list[Part]:
        return [Part(part.out, part.lse / math.log(2.0)) for part in parts]

    def merge(self, parts: list[Part]) -> Part:
        result = merge_sequential(parts)
        return Part(result.out, result.lse * math.log(2.0))


class MeanOfParts(TileKernel):
    def merge(self, parts: list[Part]) -> Part:
        return Part(torch.stack([part.out for part in parts]).mean(0), merge_sequential(parts).lse)


class Base2Lse(TileKernel):
    """The lse that the kernel returns is in base 2."""

    def store(self, result: Part) -> Part:
        return super().store(Part(result.out, result.lse / math.log(2.0)))


class LastPartLost(TileKernel):
    """The merge rounds the number of parts down to a power of two."""

    def merge(self, parts: list[Part]) -> Part:
        return super().merge(parts[: 1 << (len(parts).bit_length() - 1)])


class NoCommonMaximum(TileKernel):
    """Merge weights exp(lse) instead of exp(lse - max lse)."""

    def merge(self, parts: list[Part]) -> Part:
        weights = torch.stack([torch.exp(part.lse) for part in parts])
        total = weights.sum(0)
        out = sum(w[..., None] * part.out for w, part in zip(weights, parts, strict=True)) / total[..., None]
        return Part(torch.as_tensor(out), torch.log(total))


class FixUpColumns(TileKernel):
    """The fix-up of the last part writes its columns 16 further on."""

    def stored(self, row: Row, parts: list[Part]) -> list[Part]:
        if len(parts) > 1:
            parts[-1] = Part(parts[-1].out.roll(16, -1), parts[-1].lse)
        return parts


class PartOfOtherBatch(TileKernel):
    """Partial results are found by a stride that leaves the sequence out of account."""

    def __init__(self, spec: str, *, kv: int) -> None:
        super().__init__(spec, kv=kv)
        self.kept: dict[int, Part] = {}

    def stored(self, row: Row, parts: list[Part]) -> list[Part]:
        if len(parts) > 1:
            if row.b and self.kept[row.n].out.shape == parts[0].out.shape:
                parts[0] = self.kept[row.n]
            self.kept[row.n] = parts[0]
        return parts


class EmptyPartNaN(TileKernel):
    """A part with no visible key is 0 / 0."""

    def closed(self, state: State) -> Part:
        return Part(state.a / state.l[..., None], state.m + torch.log(state.l))


class EmptyPartFinite(TileKernel):
    """A part with no visible key has lse 0: it weighs as much as a key."""

    def closed(self, state: State) -> Part:
        part = super().closed(state)
        return Part(part.out, torch.where(torch.isneginf(part.lse), 0.0, part.lse))

    def no_part(self, row: Row) -> Part:
        return super().closed(self.begin(row))


class EmptyRowPlusInf(TileKernel):
    """A row with no visible key has lse +inf."""

    def no_part(self, row: Row) -> Part:
        part = super().no_part(row)
        return Part(part.out, -part.lse)


class EmptyRowNaN(TileKernel):
    """A row with no visible key is 0 / 0."""

    def no_part(self, row: Row) -> Part:
        part = super().no_part(row)
        return Part(part.out * math.nan, part.lse)


class Race(TileKernel):
    """Now and then the merge runs before the last part is written."""

    def __init__(self, spec: str, *, kv: int) -> None:
        super().__init__(spec, kv=kv)
        self.generator = torch.Generator().manual_seed(7)

    def stored(self, row: Row, parts: list[Part]) -> list[Part]:
        if len(parts) > 1:
            # Drawn on the host: the same rows on every device.
            written = (torch.rand(row.q.shape[:2], generator=self.generator) >= 0.05).to(row.q.device)
            parts[-1] = Part(parts[-1].out * written[..., None], parts[-1].lse)
        return parts


# Which keys


class LastKeyDropped(TileKernel):
    def visible(self, call: Call, n_kv: int) -> int:
        return max(n_kv - 1, min(n_kv, 1))


class PartialTileDropped(TileKernel):
    """Only whole tiles are read, once there is one."""

    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        tiles = super().tiles(start, stop)
        return [t for t in tiles if t[1] - t[0] == self.plan.block] or tiles


class LoneKeyDropped(TileKernel):
    """The last tile is lost where it has one key (n_kv % 32 = 1)."""

    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        tiles = super().tiles(start, stop)
        return tiles[:-1] if len(tiles) > 1 and tiles[-1][1] - tiles[-1][0] == 1 else tiles


class PaddingSeen(TileKernel):
    """The last tile is padded with zero keys that are not masked."""

    def load(self, x: torch.Tensor, row: Row, first: int, last: int) -> torch.Tensor:
        seen = super().load(x, row, first, last)
        if last < row.n or last - first == self.plan.block:
            return seen
        padding = self.plan.block - (last - first)
        return torch.cat((seen, seen.new_zeros((padding, *seen.shape[1:]))))

    def mask(self, row: Row, s: torch.Tensor, first: int) -> torch.Tensor:
        return super().mask(replace(row, n=max(row.n, first + s.shape[-1])), s, first)


class FirstRowsLength(TileKernel):
    """A launch for rows of one length, taken for rows of several."""

    def visible(self, call: Call, n_kv: int) -> int:
        return int(call.kv_len[0, 0])


class KeyBeyond(TileKernel):
    """One key beyond kv_len is seen."""

    def visible(self, call: Call, n_kv: int) -> int:
        return min(n_kv + 1, call.shape.keys) if n_kv else 0


class CutKeyTwice(TileKernel):
    """A part ends one key too late: the first key of the next part counts twice."""

    def part_bounds(self, cuts: tuple[int, ...]) -> list[tuple[int, int]]:
        return [(a, min(b + 1, cuts[-1])) for a, b in super().part_bounds(cuts)]


class CutKeyLost(TileKernel):
    """A part begins one key too late: the first key after each cut is lost."""

    def part_bounds(self, cuts: tuple[int, ...]) -> list[tuple[int, int]]:
        return [(a + (a > 0 and a + 1 < b), b) for a, b in super().part_bounds(cuts)]


class TilesSwapped(TileKernel):
    """Values of the second tile are read where the third one's belong."""

    def values(self, row: Row, first: int, last: int) -> torch.Tensor:
        if first == 2 * self.plan.block:
            return super().values(row, first - self.plan.block, last - self.plan.block)
        return super().values(row, first, last)


class OffsetWraps(TileKernel):
    """Offsets in elements are kept in 16 bits, signed: emulates what 32 bits do beyond 2^31 elements."""

    bits = 16

    def load(self, x: torch.Tensor, row: Row, first: int, last: int) -> torch.Tensor:
        key = x.shape[2] * x.shape[3]
        positions = torch.arange(first, last, device=x.device)
        half = 1 << (self.bits - 1)
        wrapped = (positions * key + half) % (2 * half) - half
        # Reading before the beginning would be an illegal access; it is clamped to stay one process.
        return x[row.b, (wrapped // key).clamp(min=0)].float()[:, row.kv_head]


class OffsetWraps32(OffsetWraps):
    """The same in 32 bits: only inputs beyond 2^31 elements show it."""

    bits = 32


class StridesIgnored(TileKernel):
    """K and V are read as if they lay contiguously."""

    def load(self, x: torch.Tensor, row: Row, first: int, last: int) -> torch.Tensor:
        if not x.is_contiguous():
            dense = torch.empty(x.shape, dtype=x.dtype, device="meta").stride()
            x = x.as_strided(x.shape, dense, x.storage_offset())
        return super().load(x, row, first, last)


class WindowDropped(TileKernel):
    def mask(self, row: Row, s: torch.Tensor, first: int) -> torch.Tensor:
        return super().mask(replace(row, call=replace(row.call, sliding_window=None)), s, first)


class WindowOffByOne(TileKernel):
    """The window holds one key more."""

    def mask(self, row: Row, s: torch.Tensor, first: int) -> torch.Tensor:
        window = row.call.sliding_window
        wider = None if window is None else window + 1
        return super().mask(replace(row, call=replace(row.call, sliding_window=wider)), s, first)


class PrefillKeyDropped(TileKernel):
    """On the prefill path a row does not see its own key."""

    def visible(self, call: Call, n_kv: int) -> int:
        return n_kv if call.path == "decode" else max(n_kv - 1, min(n_kv, 1))


# Which heads


class HeadsInterleaved(TileKernel):
    """Query head h reads KV head h % Hkv."""

    def kv_heads(self, shape: Shape, groups: tuple[int, ...]) -> torch.Tensor:
        return torch.arange(shape.q_heads) % shape.kv_heads


class GroupDoesNotDivide(TileKernel):
    """Query head h reads KV head h // g with g the first group's size."""

    def kv_heads(self, shape: Shape, groups: tuple[int, ...]) -> torch.Tensor:
        return (torch.arange(shape.q_heads) // groups[0]).clamp(max=shape.kv_heads - 1)


class SecondGroupsQuery(TileKernel):
    """The second head group reads the first group's query heads."""

    def query(self, call: Call, b: int, t: torch.Tensor) -> torch.Tensor:
        q = super().query(call, b, t)
        groups, r = self.plan.groups(call.shape.ratio), call.shape.ratio
        heads = torch.arange(call.shape.q_heads)
        inside = heads % r
        return q[:, torch.where(inside >= groups[0], heads - groups[0], heads)]


class SinkOfFirstGroup(TileKernel):
    """The second head group takes the first group's sinks."""

    def sink(self, row: Row) -> torch.Tensor:
        heads, r = torch.arange(row.call.shape.q_heads), row.call.shape.ratio
        first = self.plan.groups(r)[0]
        return super().sink(row)[torch.where(heads % r >= first, heads - first, heads)]


class LastColumns(TileKernel):
    """The last 16 columns of V are not written for the last query head of each KV head."""

    def store(self, result: Part) -> Part:
        out = result.out.clone()
        out[..., -1, -16:] = 0
        return super().store(Part(out, result.lse))


# Softmax and its options


class NoRescaleOfA(TileKernel):
    def rescaled(self, state: State, m: torch.Tensor) -> None:
        a, moved = state.a, ~torch.isneginf(state.m)
        super().rescaled(state, m)
        state.a = torch.where(moved[..., None], a, state.a)


class NoRescaleOfL(TileKernel):
    def rescaled(self, state: State, m: torch.Tensor) -> None:
        l, moved = state.l, ~torch.isneginf(state.m)
        super().rescaled(state, m)
        state.l = torch.where(moved, l, state.l)


class LateMaximum(TileKernel):
    """The maximum is not updated in a row's last tile: P is relative to the one before and may overflow."""

    def update(self, state: State, s: torch.Tensor, v: torch.Tensor) -> None:
        if s.shape[-1] < self.plan.block and not bool(torch.isneginf(state.m).any()):
            p = torch.exp(s - state.m[..., None])
            state.l = state.l + p.sum(-1)
            state.a = self.accumulate(state.a, p.half().float(), v)
            return
        super().update(state, s, v)


class SoftcapDropped(TileKernel):
    def cap(self, row: Row, s: torch.Tensor) -> torch.Tensor:
        return s


class AlibiDropped(TileKernel):
    def bias(self, row: Row, s: torch.Tensor, first: int) -> torch.Tensor:
        return s


class SinksDropped(TileKernel):
    def with_sink(self, row: Row, parts: list[Part]) -> list[Part]:
        return parts or super().with_sink(row, parts)


class SinkInEveryPart(TileKernel):
    def with_sink(self, row: Row, parts: list[Part]) -> list[Part]:
        sink = super().with_sink(row, [])
        return parts + sink * max(len(parts), 1)


# Arithmetic


class UndeclaredF16(TileKernel):
    """Accumulates in float16 and says float32."""

    def accumulate(self, a: torch.Tensor, p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return accumulate_f16(a, p, v)


class F16Overflow(TileKernel):
    """Declared float16 accumulators, but nothing keeps sums of large values below 65504."""

    def __init__(self, spec: str) -> None:
        super().__init__(spec, acc="f16")


class F16Logits(TileKernel):
    """Q K^T is accumulated and kept in float16."""

    def logits(self, row: Row, k: torch.Tensor) -> torch.Tensor:
        return (torch.einsum("thd,nhd->thn", row.q, k).half() * row.call.scale).float()


class ScaleOfResult(TileKernel):
    """The result is wrong by one factor."""

    factor = 1.02

    def store(self, result: Part) -> Part:
        return super().store(Part(result.out * self.factor, result.lse))


class SlightScale(ScaleOfResult):
    """By so little that no single element shows it."""

    factor = 1 + 2e-4


class ScaleOfValueSize(TileKernel):
    """The softmax scale is off by a thousandth, as one kept in bfloat16 is."""

    def logits(self, row: Row, k: torch.Tensor) -> torch.Tensor:
        return super().logits(row, k) * (1 + 2.0**-9)


class WrongCacheType(TileKernel):
    """The bits of V are read as another 16-bit type in the second half of the head."""

    def values(self, row: Row, first: int, last: int) -> torch.Tensor:
        v = super().values(row, first, last)
        half = v.shape[-1] // 2
        other = v[..., half:].half().view(torch.int16).view(torch.bfloat16).float()
        return torch.cat((v[..., :half], other), -1)


class ExpandedTwice(TileKernel):
    """The scales of the cache's blocks of 32 are multiplied in twice."""

    def values(self, row: Row, first: int, last: int) -> torch.Tensor:
        v = super().values(row, first, last)
        blocks = v.unflatten(-1, (-1, 16))
        return (blocks * blocks.abs().amax(-1, keepdim=True) / 127).flatten(-2)


# Dispatch


class NeverRan(TileKernel):
    """A gate that is too narrow sends every call to the old path, one part and one group."""

    def plan_of(self, shape: Shape, n: int) -> RowPlan:
        old = Plan(heads=None, kv=KVCuts("parts", 1), block=self.plan.block)
        return old.at(n, ratio=shape.ratio, kv_heads=shape.kv_heads, k_size=shape.k_size, v_size=shape.v_size)


class OtherHeadSize(TileKernel):
    """Right for a head size of 64, a key too few for all others."""

    def visible(self, call: Call, n_kv: int) -> int:
        return n_kv if call.shape.k_size == 64 else max(n_kv - 1, min(n_kv, 1))


def _fault(
    name: str,
    kind: type[TileKernel],
    what: str,
    *references: str,
    **options: object,
) -> Fault:
    def build() -> Kernel:
        return kind(name, **options)  # type: ignore[arg-type]

    written = [f"{key}={'+'.join(map(str, x)) if isinstance(x, tuple) else x}" for key, x in options.items()]
    plan = ",".join(written) or "kv=1"
    needs = "cuda" if kind is OffsetWraps32 else ""
    return Fault(name, what, references or ("emulated",), plan, build, needs)  # type: ignore[arg-type]


FAULTS: tuple[Fault, ...] = (
    _fault("base-2 merge", Base2Merge, "merge weights from a base-2 lse read as base e", "SGLang #40903",
           "SGLang #35045", "FlashInfer #2113", "vLLM #47079", kv=3),
    _fault("base-2 lse", Base2Lse, "the returned lse is in base 2", "FlashInfer #2113"),
    _fault("mean of parts", MeanOfParts, "parts are averaged without weights", kv=3),
    _fault("last part lost", LastPartLost, "parts beyond a power of two are not merged", kv=3),
    _fault("no common maximum", NoCommonMaximum, "merge weights overflow or underflow", "vLLM #49294", kv=3),
    _fault("fix-up columns", FixUpColumns, "the stream-k fix-up writes the wrong columns",
           "llama.cpp #17089", kv=3),
    _fault("part of other batch", PartOfOtherBatch, "the combine kernel's stride over the batch is wrong",
           "FlagGems #5235", "FlagGems #5236", "vllm flash-attention #176", kv=3),
    _fault("empty part NaN", EmptyPartNaN, "a part that sees no key gives NaN", "FlashInfer #4051",
           "vLLM #28181", "PyTorch #103749", "PyTorch #110213", kv=3),
    _fault("empty part finite", EmptyPartFinite, "a part that sees no key has a finite lse",
           "vLLM #28181", "vLLM #49294", kv=3),
    _fault("empty row +inf", EmptyRowPlusInf, "an empty row has lse +inf", "vLLM #49294"),
    _fault("empty row NaN", EmptyRowNaN, "an empty row gives NaN", "PyTorch #103749", "PyTorch #110213"),
    _fault("race", Race, "blocks race: now and then a part is merged before it is written", "ik #1104", kv=3),
    _fault("last key dropped", LastKeyDropped, "the newest key is not seen", "llama.cpp #18487"),
    _fault("partial tile dropped", PartialTileDropped, "the last, partial tile is not read",
           "llama.cpp #18487", block=32),
    _fault("lone key dropped", LoneKeyDropped, "the last tile is lost where it holds one key",
           "PyTorch #191937", block=32),
    _fault("padding seen", PaddingSeen, "zero padding of the last tile counts as keys",
           "llama.cpp #18487"),
    _fault("first row's length", FirstRowsLength, "every row sees as many keys as the first of its call"),
    _fault("key beyond", KeyBeyond, "one key beyond kv_len is seen", "llama.cpp #18487"),
    _fault("cut key twice", CutKeyTwice, "the key at a cut counts in both parts", kv=3),
    _fault("cut key lost", CutKeyLost, "the key at a cut counts in no part", kv=3),
    _fault("tile read twice", TilesSwapped, "V of one tile is read in place of the next one's"),
    _fault("offset wraps", OffsetWraps, "an offset overflows its integer (16 bits here)", "llama.cpp #14840",
           "llama.cpp #23610", "llama.cpp #24945", "ik #1458", "flash-attention #772", "PyTorch #187227"),
    _fault("offset wraps at 2^31", OffsetWraps32, "an offset overflows 32 bits", "llama.cpp #14840",
           "flash-attention #772", block=16384),
    _fault("strides ignored", StridesIgnored, "K and V are read as if they were contiguous",
           "FlagGems #5235", "vllm flash-attention #176"),
    _fault("window dropped", WindowDropped, "the sliding window is not applied", "ik #1183"),
    _fault("window off by one", WindowOffByOne, "the sliding window holds one key more"),
    _fault("prefill key dropped", PrefillKeyDropped, "on the prefill path a row does not see its own key"),
    _fault("heads interleaved", HeadsInterleaved, "query head h reads KV head h % Hkv", "llama.cpp #19092"),
    _fault("group does not divide", GroupDoesNotDivide, "query head h reads KV head h // group",
           "llama.cpp #19092", "llama.cpp #19115", heads=(4, 2)),
    _fault("second group's query", SecondGroupsQuery, "the second head group reads the first group's q",
           heads=(4, 2)),
    _fault("second group's sinks", SinkOfFirstGroup, "the second head group takes the first group's sinks",
           heads=(4, 2)),
    _fault("last columns", LastColumns, "the last columns of one head are not written", "llama.cpp #17089"),
    _fault("accumulator not rescaled", NoRescaleOfA, "a is not rescaled when the maximum moves"),
    _fault("denominator not rescaled", NoRescaleOfL, "l is not rescaled when the maximum moves"),
    _fault("late maximum", LateMaximum, "the maximum is not updated in the last tile"),
    _fault("softcap dropped", SoftcapDropped, "softcap is not applied on the fast path", "ik #1183"),
    _fault("ALiBi dropped", AlibiDropped, "ALiBi is not applied on the fast path", "ik #1183"),
    _fault("sinks dropped", SinksDropped, "sinks are never applied", "ik #2087"),
    _fault("sink in every part", SinkInEveryPart, "the sink is counted once a part", kv=3),
    _fault("f16 overflow", F16Overflow, "a float16 accumulator overflows", "llama.cpp #17746",
           "llama.cpp #18614", "ik #1196"),
    _fault("undeclared f16", UndeclaredF16, "decode accumulates in float16, which nobody said", "ik #2144"),
    _fault("f16 logits", F16Logits, "Q K^T is kept in float16", "llama.cpp #17746"),
    _fault("wrong by 2 %", ScaleOfResult, "every result is 2 % too large"),
    _fault("wrong by 2e-4", SlightScale, "every result is 0.02 % too large"),
    _fault("softmax scale", ScaleOfValueSize, "the softmax scale is 0.2 % too large"),
    _fault("wrong cache type", WrongCacheType, "half of V is read as another type", "ik #1452"),
    _fault("expanded twice", ExpandedTwice, "the scales of a quantised cache are applied twice", "ik #1206"),
    _fault("never ran", NeverRan, "the new path never ran: one part and one group did", "ik #1973",
           "flash-attention #2901", kv=3, heads=(4, 2)),
    _fault("other head size", OtherHeadSize, "only head size 64 is right", "ik #1452"),
)  # fmt: skip
