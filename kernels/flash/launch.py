"""The launches of a prepared call on the current stream, and what was launched.

`Prepared.launch` only launches, so that it can be captured in a CUDA graph; `prepare` made the call ready.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import torch

from verify.kernels.call import AttentionOutput, Call
from verify.kernels.flash import compiled, slots
from verify.kernels.flash.forms import PLAIN, Forms, longest_first
from verify.kernels.flash.rows import RowPlans
from verify.kernels.flash.tiles import Tiles, next_power_of_two, split_head
from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.rotation import rotate
from verify.kernels.trace import Launched

# Floats of partial results held at once (1 GiB). A fixed rule of the shapes: no bit depends on free memory.
PARTIALS_AT_ONCE = 1 << 28
# Slots, one a head, whose states are held where they are counted (128 MiB).
COUNTED_AT_ONCE = 1 << 27
# Bunches that the tiles of a window are cut into, the longest rows first: few enough that programs which run
# side by side read the same keys (measured: benchmarks/results/h200-prefill-tiles.json).
BUNCHES = 4
LOG2_E = math.log2(math.e)


@functools.cache
def device_code() -> Any:
    """The module of kernels; importing it decides whether Triton compiles or interprets them."""
    from verify.kernels.flash import device as flash_device

    return flash_device


def interpreted() -> bool:
    """Whether Triton interprets the kernels, on tensors of the CPU."""
    from verify.kernels.flash.tile_arithmetic import INTERPRETED

    return INTERPRETED


@functools.cache
def source_hash() -> str:
    """Hash of the device code: the `binary` in the trace where Triton interprets it."""
    names = ("device.py", "tile_arithmetic.py", "tile_rows.py", "quantised.py", "wide.py")
    sources = [FilePath(__file__).with_name(name) for name in names]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


@functools.lru_cache(maxsize=256)
def _groups_on(device: torch.device, head_groups: tuple[int, ...]) -> torch.Tensor:
    """[G, 2] int32: first head and size of each group."""
    firsts = [sum(head_groups[:i]) for i in range(len(head_groups))]
    return torch.tensor(list(zip(firsts, head_groups, strict=True)), dtype=torch.int32, device=device)


def parts_at_once(slots: int) -> int:
    """Parts that the combining kernel loads at once: latency against registers, no matter of arithmetic."""
    return min(max(next_power_of_two(slots), 4), 32)


def _common_size(head_groups: tuple[int, ...]) -> int:
    """The size of all groups but the last, which is no larger; 0 where they differ."""
    first = head_groups[0]
    return first if all(g == first for g in head_groups[:-1]) and head_groups[-1] <= first else 0


def shares_memory(call: Call) -> bool:
    """Whether v is the first Dv numbers of each key, in the same memory (MLA's latent cache)."""
    k, v = call.k, call.v
    same_place = k.data_ptr() == v.data_ptr() and k.stride()[:3] == v.stride()[:3]
    return same_place and split_head(call.shape.k_size).first == call.shape.v_size


class Planes(NamedTuple):
    """A quantised k and v as `quantised`, or `wide`, reads them (the modules' texts have the layouts)."""

    k: compiled.CodeType  # of keys
    k_codes: torch.Tensor  # [B, Hkv, S, bytes]
    k_scales: torch.Tensor  # by reader
    v: compiled.CodeType  # that of k, but for `reader=cuda`
    v_codes: torch.Tensor  # [B, Hkv, S, bytes]
    v_scales: torch.Tensor  # by reader
    reader: str = "chunks"  # or wide, swapped, cuda: which kernel reads them

    def of_sequences(self, b: slice) -> dict[str, torch.Tensor]:
        """The planes of some sequences, by the names of the parameters that take them."""
        names = ("k_codes", "k_scales", "v_codes", "v_scales")
        return {name: getattr(self, name)[b] for name in names}


@functools.cache
def quantised_code() -> Any:
    """The module of kernels that read quantised caches."""
    from verify.kernels.flash import quantised as flash_quantised

    return flash_quantised


@functools.cache
def wide_code() -> Any:
    """The module of kernels that read them a whole row at a time."""
    from verify.kernels.flash import wide as flash_wide

    return flash_wide


def expanded(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """A plane of codes and one of scales as float16 [B, S, Hkv, D]: a view of [B, Hkv, S, D]."""
    batch, heads, keys, width = codes.shape
    size = width * 8 // bits
    assert width % 32 == 0, "the kernel expands 32 codes at a time"
    out = torch.empty((batch, heads, keys, size), dtype=torch.float16, device=codes.device)
    quantised_code().expand_planes[(-(-keys // 64), batch * heads)](
        codes, scales, out, keys, D=size, BITS=bits, TILE=64
    )
    return out.transpose(1, 2)


class Chunk(NamedTuple):
    """Rows t of sequences b; one of the two ranges is everything, so `out` of them is contiguous.

    tile_rows [tiles, 3] int32: of packed tokens the sequence, the first row and the rows of each matrix tile.
    """

    b: slice
    t: slice
    tile_rows: torch.Tensor | None = None


@dataclass
class Launches:
    """One bucket of rows that follow the same head groups: what is launched for it."""

    head_groups: tuple[int, ...]  # query heads of each
    launch: str  # `one` launch for all groups, or `each`
    parts: int  # of the KV range, where their number is given; else 0
    tiles_a_part: int  # where their size is given; else 0
    slots: int  # places for partial results a row and head: the most parts of a row
    kv_len: torch.Tensor  # [B, T] int32, -1 at rows of other buckets
    same_length: int  # keys of every row; of several tokens of the newest, the others one less each; or -1
    chunks: list[Chunk]  # what is launched at a time
    binaries: list[str] = field(default_factory=list)  # hashes of what was launched, when it was


@dataclass
class Prepared:
    """A call ready to launch: `launch()` writes `out` [B, T, Hq, Dv] and `lse` [B, T, Hq]."""

    call: Call  # as the device code takes it
    options: TileOptions  # of the specification, with the call's own plan
    tiles: Tiles  # sizes of the matrix tiles
    window_tiles: Tiles  # of those in which rows of a window lie side by side on the path decode
    overlap: bool  # the combining launch may begin early
    copy_engine: bool  # the device has one that copies tiles to shared memory
    out: torch.Tensor  # float32
    lse: torch.Tensor  # float32
    launches: list[Launches]  # one a kind of rows
    lengths: tuple[int, ...]  # keys that each row goes through, [B * T]
    rows: RowPlans  # the plan of each row
    notes: list[str]  # what a reader must know of the call
    forms: Forms = PLAIN  # pages, packed tokens, a mask, lists of keys
    planes: Planes | None = None  # k and v of a quantised cache; None: they are numbers
    expand: bool = False  # planes are made float16 before every launch
    rotation: int = 0  # blocks in which values were rotated before they were stored, 0: they were not

    def launch(self, written: list[torch.Tensor] | None = None) -> AttentionOutput:
        """Launch everything on the current stream; nothing here waits for the device.

        written: where it is given, slots are filled beforehand, and it gets what they hold after the launch
        (`slots.states`, [B', T, slots, Hq]) for each of `launches`: of the first B' sequences, which are all
        of them but in the largest calls.
        """
        call = self.call
        if self.out.numel() == 0:
            return AttentionOutput(self.out, self.lse)
        if self.planes is not None and self.expand:
            # As engines do it: the whole cache becomes float16 at every call.
            of, bits = self.planes, self.planes.k.bits
            k, v = expanded(of.k_codes, of.k_scales, bits), expanded(of.v_codes, of.v_scales, bits)
            self.call = replace(call, k=k, v=v)
        if written is not None:
            slots.fill(self.lse)
        for kind, item in enumerate(self.launches):
            state, sampled = None, None
            if written is not None:
                batch, rows, heads = self.lse.shape
                counted = min(max(COUNTED_AT_ONCE // (rows * item.slots * heads), 1), batch)
                state = self.lse.new_empty((counted, rows, item.slots, heads), dtype=torch.int8)
                written.append(state)
                sampled = self._longest_row(kind, counted)
            for chunk in item.chunks:
                part_lse = self._attend(item, chunk, counted=state is not None)
                if state is not None:
                    self._note_written(state, part_lse, chunk, sampled)
        out = rotate(self.out, self.rotation)
        if self.options.out != "f32":
            out = out.to(FLOAT_TYPES[self.options.out].dtype).float()
        return AttentionOutput(out, self.lse)

    def _longest_row(self, kind: int, sequences: int) -> int | None:
        """Of the rows of a kind, numbered through the first sequences, the one with the most keys; None
        where it has none."""
        mine = range(sequences * self.call.shape.rows)
        mine_of_kind = [row for row in mine if self.rows.kind_of_row[row] == kind]
        longest = max(mine_of_kind, key=self.lengths.__getitem__, default=None)
        return longest if longest is not None and self.lengths[longest] > 0 else None

    def _note_written(
        self, state: torch.Tensor, part_lse: torch.Tensor, chunk: Chunk, sampled: int | None
    ) -> None:
        """Into `state` of the first sequences what rows t of sequences b wrote, [sequences, rows, slots, Hq];
        of the sampled row, where it is one of them, also whether it is what its keys come to."""
        b, t, _ = chunk
        mine = state[b, t]
        mine.copy_(slots.states(part_lse[: len(mine)]))
        if sampled is None:
            return
        row, token = divmod(sampled, self.call.shape.rows)
        batch, rows = (
            range(*x.indices(n)) for x, n in ((b, self.call.shape.batch), (t, self.call.shape.rows))
        )
        if row not in batch or token not in rows:
            return
        n_kv, cuts, ratio = self.lengths[sampled], self.rows.plans[sampled].cuts, self.call.shape.ratio
        kv_head = n_kv % self.call.shape.kv_heads
        at = (
            batch.index(row),
            rows.index(token),
            slice(len(cuts) - 1),
            slice(kv_head * ratio, (kv_head + 1) * ratio),
        )
        slots.mark_other_keys(
            mine[at], part_lse[at], *slots.lse_of_parts(self.call, row, token, n_kv, kv_head, cuts)
        )

    def _attend(self, item: Launches, chunk: Chunk, *, counted: bool) -> torch.Tensor:
        """counted: slots are filled beforehand. Returns what they hold, [sequences, rows, slots, Hq]."""
        call, shape = self.call, self.call.shape
        b, t, tile_rows = chunk
        q = call.q[b, t]
        kv_len = item.kv_len[b, t].contiguous()
        out, lse = self.out[b, t], self.lse[b, t]
        sequences, tokens = q.shape[:2]
        sizes, tokens_a_tile = self.sizes, self.tokens_a_tile(item.head_groups)
        tiles = -(-tokens // tokens_a_tile) if tile_rows is None else len(tile_rows)
        combine = item.slots > 1 or call.sinks is not None
        part_out, part_lse = out, lse
        if combine:
            part_out = out.new_empty((sequences, tokens, item.slots, shape.q_heads, shape.v_size))
            part_lse = lse.new_empty((sequences, tokens, item.slots, shape.q_heads))
            if counted:
                slots.fill(part_lse)
        groups = _groups_on(q.device, item.head_groups)
        sets = [(0, len(item.head_groups))]
        if item.launch != "one":
            sets = [(i, 1) for i in range(len(item.head_groups))]
        early = {"launch_pdl": True} if self.overlap else {}
        names = []
        for first_group, n_groups in sets:
            group_q, q_ratio, q_shift = q, shape.ratio, 0
            if item.launch == "each":
                # As #1183 does: the heads of this launch are copied into a tensor of their own.
                q_shift = sum(item.head_groups[:first_group])
                q_ratio = item.head_groups[first_group]
                by_head = q.unflatten(2, (shape.kv_heads, shape.ratio))
                group_q = by_head[:, :, :, q_shift : q_shift + q_ratio].flatten(2, 3).contiguous()
            # What both kernels take, by the names of their parameters.
            shared: dict[str, Any] = {
                "q": group_q,
                "kv_len": kv_len,
                "groups": groups,
                "out": part_out,
                "lse": part_lse,
                "tokens": tokens,
                "q_heads": shape.q_heads,
                "ratio": shape.ratio,
                "q_ratio": q_ratio,
                "q_shift": q_shift,
                "first_group": first_group,
                "n_groups": n_groups,
                "group_size": _common_size(item.head_groups),
                "same_length": -1 if self.shares_tiles else item.same_length,
                "parts": item.parts,
                "tiles_a_part": item.tiles_a_part,
                "slots": item.slots,
                "logit_scale": call.scale * LOG2_E if call.softcap is None else call.scale / call.softcap,
                **_strides("q_b q_t q_h", group_q),
                "M": sizes.rows,
                "TILE": sizes.keys,
                "BLOCK": self.options.plan.block,
                "OVERLAP": self.overlap,
                "num_warps": sizes.warps,
                "num_stages": sizes.stages,
                **early,
            }
            grid = sequences * tiles, shape.kv_heads * n_groups, item.slots
            attend = self._over_numbers if self.over_numbers else self._over_planes
            names.append(_binary_hash(attend(grid, chunk, tokens_a_tile, shared)))
        if combine:
            width = next_power_of_two(shape.v_size)
            compiled = device_code().combine_parts[(sequences * tokens, shape.q_heads)](
                part_out,
                part_lse,
                kv_len,
                call.sinks,
                out,
                lse,
                shape.q_heads,
                item.slots,
                DV=shape.v_size,
                DV1=width,
                SINKS=call.sinks is not None,
                OVERLAP=self.overlap,
                AT_ONCE=parts_at_once(item.slots),
                num_warps=min(max(width // 32, 1), 8),
                **early,
            )
            names.append(_binary_hash(compiled))
        item.binaries = sorted(set(names), key=names.index)
        return part_lse.view(sequences, tokens, item.slots, shape.q_heads)

    def _over_numbers(
        self, grid: tuple[int, ...], chunk: Chunk, tokens_a_tile: int, shared: dict[str, Any]
    ) -> Any:
        """One launch over keys and values as they are; returns what was compiled for it."""
        call, shape, code = self.call, self.call.shape, device_code()
        k, v = call.k, call.v
        if not self.forms.page and chunk.tile_rows is None:
            k, v = k[chunk.b], v[chunk.b]
        alone = token_a_tile(call) and not self.shares_tiles
        dk, dv = (split_head(size, self.sizes.rows) for size in (shape.k_size, shape.v_size))
        k_tiles = v_tiles = None
        if self.copies_tiles:
            k_tiles, v_tiles = _tiles_of(k, self.sizes.keys), _tiles_of(v, self.sizes.keys)
        return code.attend_tiles[grid](
            k=k,
            v=v,
            k_tiles=k_tiles,
            v_tiles=v_tiles,
            alibi=call.alibi_slopes,
            keys=shape.keys,
            tokens_a_tile=tokens_a_tile,
            tiles=-(-shared["tokens"] // tokens_a_tile),
            tiles_a_bunch=max(grid[0] // BUNCHES, 1),
            softcap=(1.0 if call.softcap is None else call.softcap) * LOG2_E,
            window=call.sliding_window or 0,
            **_strides("k_b k_s k_h", k),
            **_strides("v_b v_s v_h", v),
            DK=shape.k_size,
            DK1=dk.first,
            DK2=dk.rest,
            DV=shape.v_size,
            DV1=dv.first,
            DV2=dv.rest,
            V_IS_K=shares_memory(call),
            DECODE=alone,
            SEVERAL=(call.path == "several" or self.shares_tiles) and not alone,
            AS_ALONE=self.shares_tiles,
            **self.forms.arguments(*chunk),
            P_TYPE=getattr(code.tl, FLOAT_TYPES[self.options.p].torch_name),
            ACC_F16=self.options.acc == "f16",
            SOFTCAP=call.softcap is not None,
            WINDOW=call.sliding_window is not None,
            ALIBI=call.alibi_slopes is not None,
            COPIED=k_tiles is not None,
            BUNCHED=k_tiles is not None or self.shares_tiles,
            **shared,
        )

    @property
    def over_numbers(self) -> bool:
        """Whether keys and values are read as numbers, and not as the planes of a quantised cache."""
        return self.planes is None or self.expand

    @property
    def shares_tiles(self) -> bool:
        """Whether rows of the path decode lie side by side in matrix tiles, as many as fill them. Each has
        the bits that it has alone: its sums go over as many keys a tile in the same order, and what it does
        not see leaves them as they are."""
        call = self.call
        beside = call.shape.rows > 1 and shared_tokens(call, self.window_tiles) > 1
        return call.path == "decode" and not call.has_forms and beside and self.over_numbers

    @property
    def sizes(self) -> Tiles:
        """Of the matrix tiles that are launched."""
        return self.window_tiles if self.shares_tiles else self.tiles

    def tokens_a_tile(self, head_groups: tuple[int, ...]) -> int:
        """Query tokens of one matrix tile. Where a row has its bits whatever lies beside it, as many as the
        largest head group leaves room for."""
        if self.shares_tiles:
            return self.window_tiles.rows // max(head_groups)
        return tile_tokens(self.call, self.tiles)

    @property
    def copies_tiles(self) -> bool:
        """Whether tiles that every row of a matrix tile sees whole are copied by the device's copy engine: on
        the path prefill, of a plain call over tensors that it can describe. A rule of the call alone."""
        call, shape = self.call, self.call.shape
        plain = call.softcap is None and call.sliding_window is None and call.alibi_slopes is None
        if call.path != "prefill" or call.has_forms or not plain or not self.copy_engine:
            return False
        whole = all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (call.k, call.v))
        whole = whole and call.q.element_size() == 2
        powers = all(size & (size - 1) == 0 and size >= 64 for size in (shape.k_size, shape.v_size))
        rows = shape.batch * shape.keys
        return whole and powers and max(shape.k_size, shape.v_size) <= 256 and 0 < rows < 1 << 31

    def _over_planes(
        self, grid: tuple[int, ...], chunk: Chunk, tokens_a_tile: int, shared: dict[str, Any]
    ) -> Any:
        """The same over a quantised cache, on the decode path."""
        assert self.planes is not None and tokens_a_tile == 1
        shape, planes = self.call.shape, self.planes
        # What every reader takes of them, by the names of its parameters.
        held = {"keys": shape.keys, "kv_heads": shape.kv_heads, **planes.of_sequences(chunk.b)}
        if planes.reader == "cuda":
            return self._compiled(grid, planes, {**shared, **held})
        if planes.reader == "chunks":
            attend, more = quantised_code().attend_quantised, {}
        else:
            attend = wide_code().attend_wide
            more = {"FP8": planes.k.fp8, "SWAPPED": planes.reader == "swapped"}
        return attend[grid](D=shape.k_size, BITS=planes.k.bits, **held, **more, **shared)

    def _compiled(self, grid: tuple[int, ...], planes: Planes, given: dict[str, Any]) -> Any:
        """The same by the reader in CUDA C++, which takes some of what is given."""
        kind = compiled.ReaderKind(planes.k, planes.v, given["BLOCK"], given["OVERLAP"])
        reader = compiled.compiled(kind, self.call.q.device.index)
        reader.launch(grid, compiled.asked_of(**{name: given[name] for name in compiled.TAKEN}))
        return reader

    def launched(self, kernel: str, written: Sequence[torch.Tensor]) -> tuple[Launched, bool]:
        """What `launch` launched, counted by what it wrote, and whether that is the plan.

        Call it after the launch, whose binaries it names. Waits for the device.
        """
        binaries = ["+".join(item.binaries) for item in self.launches]
        path, window = self.call.path, self.call.sliding_window
        seen = slots.parts_seen(self.call, self.rows, max((item.slots for item in self.launches), default=1))
        if slots.as_planned(self.rows, self.lengths, written, window, seen):
            return slots.rows_as_planned(self.rows, path, kernel, binaries), True
        counted = slots.rows_as_written(
            self.rows,
            self.lengths,
            written,
            window,
            ratio=self.call.shape.ratio,
            path=path,
            kernel=kernel,
            binaries=binaries,
        )
        return counted, False


def _tiles_of(x: torch.Tensor, keys: int) -> Any:
    """k or v [B, S, Hkv, D], contiguous, as the copy engine reads it: [B * S, Hkv * D] in tiles [keys, D]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x.flatten(2).flatten(0, 1), [keys, x.shape[3]])


def _strides(names: str, x: torch.Tensor) -> dict[str, int]:
    """The first three strides of x, by the names of the parameters that take them."""
    return dict(zip(names.split(), x.stride(), strict=False))


@functools.lru_cache(maxsize=1024)
def _binary_hash(compiled: Any) -> str:
    """Hash of the machine code that was launched; of the source where Triton interprets it."""
    if compiled is None:
        return source_hash()
    return hashlib.sha256(compiled.asm["cubin"]).hexdigest()[:12]


def token_a_tile(call: Call) -> bool:
    """Whether each row has matrix tiles of its own: those that list their keys read other keys each."""
    return call.path == "decode" or call.keys is not None


def tokens_wanted(call: Call) -> int | None:
    """Tokens that a matrix tile should hold: on the path `several` all of a sequence; None: as many as do."""
    if token_a_tile(call):
        return 1
    return None if call.path == "prefill" else call.asked().n_q


def tile_tokens(call: Call, tiles: Tiles) -> int:
    """Query tokens of one matrix tile, where rows of the path decode have one of their own each."""
    return 1 if token_a_tile(call) else shared_tokens(call, tiles)


def shared_tokens(call: Call, tiles: Tiles) -> int:
    """Query tokens that a matrix tile has rows for. By r, not by head group: every grouping has the same
    tiles."""
    return max(tiles.rows // call.shape.ratio, 1)


def chunks(call: Call, slots: int, tiles: Tiles) -> list[Chunk]:
    """Ranges of sequences and rows whose partial results fit in PARTIALS_AT_ONCE.

    slots: of a row. Chunks end where matrix tiles end, so that they move no tile.
    """
    shape = call.shape
    if slots == 1:
        return [Chunk(slice(None), slice(None))]
    floats_a_row = slots * shape.q_heads * shape.v_size
    rows_at_once = max(PARTIALS_AT_ONCE // floats_a_row, 1)
    if rows_at_once >= shape.rows:
        step = rows_at_once // max(shape.rows, 1)
        return [Chunk(slice(b, b + step), slice(None)) for b in range(0, shape.batch, step)]
    unit = tile_tokens(call, tiles)
    step = max(rows_at_once // unit, 1) * unit
    return [
        Chunk(slice(b, b + 1), slice(t, t + step))
        for b in range(shape.batch)
        for t in range(0, shape.rows, step)
    ]


def packed_chunks(call: Call, slots: int, forms: Forms, lengths: Sequence[int]) -> list[Chunk]:
    """The same of packed tokens, with their tiles; lengths: keys of each row."""
    rows_at_once = max(PARTIALS_AT_ONCE // (slots * call.shape.q_heads * call.shape.v_size), 1)
    bounds = [0]
    for tile in forms.packed:
        if tile.first + tile.tokens - bounds[-1] > rows_at_once and tile.first > bounds[-1]:
            bounds.append(tile.first)
    found = []
    for t in (slice(*ends) for ends in pairwise([*bounds, call.shape.rows])):
        own = torch.tensor(longest_first(forms.packed, lengths, t), dtype=torch.int32)
        found.append(Chunk(slice(None), t, own.to(call.q.device)))
    return found
