"""Faults of how a call is made: pages, sequences of unlike lengths, several query tokens, masks.

Each class breaks one step of `TileKernel`, and says where it was seen. Calls of one sequence, with one query
token and no pages, are right.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from verify.kernels.call import Call, Result
from verify.kernels.faults.record import fault
from verify.kernels.faults.tile_kernel import TileKernel, TileRow
from verify.kernels.heads import Heads
from verify.kernels.merge import Part


def wrapped(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x as a signed integer of so many bits holds it; below 0 it would be an illegal access: clamped."""
    half = 1 << (bits - 1)
    return ((x + half) % (2 * half) - half).clamp(min=0)


@fault(
    "page number wraps",
    "numbers of pages are kept in 16 bits",
    "aiter #3062",
    "aiter #3095",
    families=("far-pages",),
)
class PageNumberWraps(TileKernel):
    def pages(self, row: TileRow, entries: torch.Tensor) -> torch.Tensor:
        return super().pages(row, entries) & 0xFFFF


@fault(
    "page offset wraps",
    "the offset of a page overflows its integer (20 bits here, for 31)",
    "vLLM #50427",
    families=("far-pages",),
)
class PageOffsetWraps(TileKernel):
    bits = 20

    def in_page(self, x: torch.Tensor, pages: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        size = x.shape[1] * x.shape[2] * x.shape[3]
        return super().in_page(x, wrapped(pages * size, self.bits) // size, inside)


@fault("neighbour's page", "the table's rows are taken to be as long as a sequence", families=("pages",))
class NeighboursPage(TileKernel):
    """Rows of a table have room for more pages: the second sequence begins in the tail of the first."""

    def pages(self, row: TileRow, entries: torch.Tensor) -> torch.Tensor:
        table, page = row.call.block_table, row.call.k.shape[1]
        assert table is not None
        at = row.b * -(-max(row.n, 1) // page) + entries
        return table.flatten()[at.clamp(max=table.numel() - 1)].long().clamp(0, len(row.call.k) - 1)


@fault("table's tail read", "a row sees a page more than it has", families=("pages",))
class TablesTailRead(TileKernel):
    """The number of pages is n_kv // page + 1, which is one too many where the last one is full."""

    def visible(self, call: Call, n_kv: int) -> int:
        page = call.k.shape[1]
        whole = call.block_table is not None and n_kv and n_kv % page == 0
        return n_kv + page if whole else n_kv

    def pages(self, row: TileRow, entries: torch.Tensor) -> torch.Tensor:
        table = row.call.block_table
        assert table is not None
        return table[row.b, entries.clamp(max=table.shape[1] - 1)].long().clamp(0, len(row.call.k) - 1)


@fault("last page's rest seen", "a row sees its last page whole", families=("pages",))
class LastPagesRest(TileKernel):
    def visible(self, call: Call, n_kv: int) -> int:
        page = call.k.shape[1]
        return n_kv if call.block_table is None else -(-n_kv // page) * page


@fault(
    "zero-length chunk",
    "after a sequence without tokens each reads the keys of the one before",
    "FlashInfer #3047",
    "SGLang #22291",
    families=("no-tokens",),
)
class ZeroLengthChunk(TileKernel):
    """Sequences are counted by where tokens begin, which leaves out those that have none."""

    def sequence(self, call: Call, b: int) -> int:
        if call.cu_seqlens is None:
            return b
        return int((call.cu_seqlens.diff()[:b] > 0).sum())

    def pages(self, row: TileRow, entries: torch.Tensor) -> torch.Tensor:
        # The table of another may end before: what would be an illegal access is page 0.
        found = super().pages(row, entries)
        return torch.where((found < 0) | (found >= len(row.call.k)), 0, found)


@fault(
    "first token's sink only",
    "sinks reach the first query token of a call alone",
    "TensorRT-LLM #15739",
    families=("sinks",),
    paths=("several", "prefill"),
)
class FirstTokensSink(TileKernel):
    def with_sink(self, row: TileRow, parts: list[Part]) -> list[Part]:
        with_it = super().with_sink(row, parts)
        if row.call.path == "decode":
            return with_it
        lse = with_it[-1].lse.clone()
        lse[row.t > 0] = -torch.inf
        return [*with_it[:-1], Part(with_it[-1].out, lse)]


@fault("tree mask one level short", "a row sees of a mask what the row before it sees", families=("tree",))
class TreeMaskShort(TileKernel):
    """Right for a chain of drafts, where that row is the one it follows."""

    def mask_of(self, row: TileRow, mask: torch.Tensor) -> torch.Tensor:
        own = super().mask_of(row, mask)
        if mask.dtype != torch.bool:
            return own
        before = mask[row.batch if len(mask) > 1 else 0][:, (row.t - 1).clamp(min=0)].transpose(0, 1)
        # Its own key, the newest that it sees.
        newest = own & (own.flip(-1).cumsum(-1).flip(-1) == 1)
        return torch.where((row.t > 0).to(own.device)[:, None, None], own & before | newest, own)


@fault("hole of a list read", "-1 in a list of keys is taken for key 0", families=("key-list",))
class HoleOfListRead(TileKernel):
    def listed(self, keys: torch.Tensor) -> torch.Tensor:
        return keys.long().clamp(min=0)


@fault(
    "other end of K",
    "V inside K is taken to be its last columns, wherever it is",
    "ik #2031",
    families=("gaussian",),
    sizes={"v_in_k": True, "heads": Heads.grouped(kv=1, ratio=6, k_size=96, v_size=64)},
)
class OtherEndOfK(TileKernel):
    """Engines have K as [latent, rope] or as [rope, latent]."""

    def values(self, row: TileRow, first: int, last: int) -> torch.Tensor:
        if row.call.v_in_k is None:
            return super().values(row, first, last)
        return self.load(row.call.k[..., -row.call.shape.v_size :], row, first, last)


class _OtherQueries(TileKernel):
    """Query tokens of some calls are taken for the first of their sequence."""

    def wrong(self, call: Call, tokens: int) -> bool:
        raise NotImplementedError

    def run(self, call: Call) -> Result:
        if call.path == "decode" or call.cu_seqlens is not None or not self.wrong(call, call.q.shape[1]):
            return super().run(call)
        return super().run(replace(call, q=call.q[:, :1].expand_as(call.q).contiguous()))


@fault(
    "four query tokens",
    "a call of exactly four query tokens computes the first of them four times",
    "llama.cpp #25618",
    families=("four-tokens",),
    paths=("several", "prefill"),
)
class FourQueryTokens(_OtherQueries):
    def wrong(self, call: Call, tokens: int) -> bool:
        return tokens == 4


@fault(
    "heads packed as of one token",
    "with 3 to 8 query tokens the heads of a group are packed as if there were one",
    "llama.cpp #26358",
    "FlashInfer #3929",
    families=("four-tokens",),
    paths=("several", "prefill"),
)
class PackedAsOfOneToken(_OtherQueries):
    def wrong(self, call: Call, tokens: int) -> bool:
        return 3 <= tokens <= 8 and call.shape.ratio > 1


@fault(
    "window by cells",
    "with a window, keys are the newest cells of the whole cache",
    "ik #2186",
    families=("window",),
    sizes={"fewer": (0, 150)},
)
class WindowByCells(TileKernel):
    """Right for the longest sequence; of a shorter one the window's keys are cut away."""

    def mask(self, row: TileRow, s: torch.Tensor, first: int) -> torch.Tensor:
        s, window = super().mask(row, s, first), row.call.sliding_window
        if window is None:
            return s
        keep = -(-(window + 16) // 16) * 16
        places = self.places(row, first, first + s.shape[-1])
        return s.masked_fill(places < int(row.call.kv_len.max()) - keep, -torch.inf)


@fault(
    "first sequence's lengths",
    "every sequence is taken to be as long as the first",
    "jax #23349",
    "TensorRT-LLM #17964",
    families=("sequences",),
)
class FirstSequencesLengths(TileKernel):
    def run(self, call: Call) -> Result:
        if call.cu_seqlens is not None or call.keys is not None or call.block_table is not None:
            return super().run(call)
        return super().run(replace(call, kv_len=call.kv_len[:1].expand_as(call.kv_len).contiguous()))


@fault("third sequence", "from the third on, sequences get the first's result", "llama.cpp #7903",
       families=("sequences",))  # fmt: skip
class ThirdSequence(TileKernel):
    def run(self, call: Call) -> Result:
        found = super().run(call)
        if call.cu_seqlens is None:
            found.out[2:] = found.out[:1]
        return found


@fault("many entries", "results of the ninth row of a call and later ones are mixed with others",
       "aiter #4076", families=("sequences",))  # fmt: skip
class ManyEntries(TileKernel):
    """A persistent kernel takes up its second row before the first is written."""

    def run(self, call: Call) -> Result:
        found = super().run(call)
        flat = found.out.flatten(0, 1)
        flat[8:] = flat[8:] * 0.97 + 0.03 * flat[:-8].clone() if len(flat) > 8 else flat[8:]
        return found


@fault(
    "scale of all rows",
    "q is rounded by a scale that all rows and sequences of a call share",
    "imp #1314",
    families=("unlike-rows",),
)
class ScaleOfAllRows(TileKernel):
    def query(self, call: Call, b: int, t: torch.Tensor) -> torch.Tensor:
        step = call.q.float().abs().amax().clamp(min=1e-6) * 2.0**-11
        return torch.round(super().query(call, b, t) / step) * step
