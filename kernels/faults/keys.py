"""Faults of which keys a row reads: ends, cuts, tiles, offsets, strides, windows.

Each class breaks one step of `TileKernel`, and says where it was seen.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from verify.kernels.call import Call
from verify.kernels.faults.record import fault
from verify.kernels.faults.tile_kernel import TileKernel, TileRow


@fault("last key dropped", "the newest key is not seen", "llama.cpp #18487")
class LastKeyDropped(TileKernel):
    def visible(self, call: Call, n_kv: int) -> int:
        return max(n_kv - 1, min(n_kv, 1))


@fault("partial tile dropped", "the last, partial tile is not read", "llama.cpp #18487", block=32)
class PartialTileDropped(TileKernel):
    """Only whole tiles are read, once there is one."""

    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        tiles = super().tiles(start, stop)
        return [t for t in tiles if t[1] - t[0] == self.plan.block] or tiles


@fault("lone key dropped", "the last tile is lost where it holds one key", "PyTorch #191937", block=32)
class LoneKeyDropped(TileKernel):
    """The last tile is lost where it has one key (n_kv % 32 = 1)."""

    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        tiles = super().tiles(start, stop)
        return tiles[:-1] if len(tiles) > 1 and tiles[-1][1] - tiles[-1][0] == 1 else tiles


@fault("padding seen", "zero padding of the last tile counts as keys", "llama.cpp #18487")
class PaddingSeen(TileKernel):
    """The last tile is padded with zero keys that are not masked."""

    def load(self, x: torch.Tensor, row: TileRow, first: int, last: int) -> torch.Tensor:
        seen = super().load(x, row, first, last)
        if last < row.n or last - first == self.plan.block:
            return seen
        padding = self.plan.block - (last - first)
        return torch.cat((seen, seen.new_zeros((padding, *seen.shape[1:]))))

    def mask(self, row: TileRow, s: torch.Tensor, first: int) -> torch.Tensor:
        return super().mask(replace(row, n=max(row.n, first + s.shape[-1])), s, first)


@fault("first row's length", "every row sees as many keys as the first of its call")
class FirstRowsLength(TileKernel):
    """A launch for rows of one length, taken for rows of several."""

    def visible(self, call: Call, n_kv: int) -> int:
        return int(call.kv_len[0, 0])


@fault("key beyond", "one key beyond kv_len is seen", "llama.cpp #18487")
class KeyBeyond(TileKernel):
    def visible(self, call: Call, n_kv: int) -> int:
        return min(n_kv + 1, call.shape.keys) if n_kv else 0


@fault("cut key twice", "the key at a cut counts in both parts", kv=3)
class CutKeyTwice(TileKernel):
    """A part ends one key too late: the first key of the next part counts twice."""

    def part_bounds(self, cuts: tuple[int, ...]) -> list[tuple[int, int]]:
        return [(a, min(b + 1, cuts[-1])) for a, b in super().part_bounds(cuts)]


@fault("cut key lost", "the key at a cut counts in no part", kv=3)
class CutKeyLost(TileKernel):
    """A part begins one key too late: the first key after each cut is lost."""

    def part_bounds(self, cuts: tuple[int, ...]) -> list[tuple[int, int]]:
        return [(a + (a > 0 and a + 1 < b), b) for a, b in super().part_bounds(cuts)]


@fault("tile read twice", "V of one tile is read in place of the next one's")
class TilesSwapped(TileKernel):
    """Values of the second tile are read where the third one's belong."""

    def values(self, row: TileRow, first: int, last: int) -> torch.Tensor:
        if first == 2 * self.plan.block:
            return super().values(row, first - self.plan.block, last - self.plan.block)
        return super().values(row, first, last)


@fault(
    "offset wraps",
    "an offset overflows its integer (16 bits here)",
    "llama.cpp #14840",
    "llama.cpp #23610",
    "llama.cpp #24945",
    "ik #1458",
    "flash-attention #772",
    "PyTorch #187227",
)
class OffsetWraps(TileKernel):
    """Offsets in elements are kept in 16 bits, signed: emulates what 32 bits do beyond 2^31 elements."""

    bits = 16

    def load(self, x: torch.Tensor, row: TileRow, first: int, last: int) -> torch.Tensor:
        if row.call.block_table is not None or row.listed is not None:
            return super().load(x, row, first, last)
        key = x.shape[2] * x.shape[3]
        positions = torch.arange(first, last, device=x.device)
        half = 1 << (self.bits - 1)
        wrapped = (positions * key + half) % (2 * half) - half
        # Reading before the beginning would be an illegal access; it is clamped to stay one process.
        return x[row.b, (wrapped // key).clamp(min=0)].float()[:, row.kv_head]


@fault(
    "offset wraps at 2^31",
    "an offset overflows 32 bits",
    "llama.cpp #14840",
    "flash-attention #772",
    needs="cuda",
    probes="far offsets",
    block=16384,
)
class OffsetWraps32(OffsetWraps):
    """The same in 32 bits: only inputs beyond 2^31 elements show it."""

    bits = 32


@fault(
    "strides ignored",
    "K and V are read as if they were contiguous",
    "FlagGems #5235",
    "vllm flash-attention #176",
)
class StridesIgnored(TileKernel):
    """K and V are read as if they lay contiguously."""

    def load(self, x: torch.Tensor, row: TileRow, first: int, last: int) -> torch.Tensor:
        if not x.is_contiguous():
            dense = torch.empty(x.shape, dtype=x.dtype, device="meta").stride()
            x = x.as_strided(x.shape, dense, x.storage_offset())
        return super().load(x, row, first, last)


@fault("window dropped", "the sliding window is not applied", "ik #1183")
class WindowDropped(TileKernel):
    def mask(self, row: TileRow, s: torch.Tensor, first: int) -> torch.Tensor:
        return super().mask(replace(row, call=replace(row.call, sliding_window=None)), s, first)


@fault("window off by one", "the sliding window holds one key more")
class WindowOffByOne(TileKernel):
    def mask(self, row: TileRow, s: torch.Tensor, first: int) -> torch.Tensor:
        window = row.call.sliding_window
        wider = None if window is None else window + 1
        return super().mask(replace(row, call=replace(row.call, sliding_window=wider)), s, first)


@fault("prefill key dropped", "on the prefill path a row does not see its own key")
class PrefillKeyDropped(TileKernel):
    def visible(self, call: Call, n_kv: int) -> int:
        return n_kv if call.path == "decode" else max(n_kv - 1, min(n_kv, 1))
