"""From a checked call to one that is ready to launch: plans of its rows, tiles, buffers, planes of its cache.

Everything here needs the host once; `launch` then only launches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from verify.kernels.cache import Quantised
from verify.kernels.call import Call
from verify.kernels.flash.compiled import CodeType
from verify.kernels.flash.forms import forms_of
from verify.kernels.flash.launch import (
    Launches,
    Planes,
    Prepared,
    chunks,
    packed_chunks,
    tile_tokens,
    token_a_tile,
)
from verify.kernels.flash.rows import RowPlans, plans_of_rows
from verify.kernels.flash.tiles import LARGEST_GROUP, LARGEST_K_HEAD, LARGEST_V_HEAD, SMALLEST_HEAD, Tiles
from verify.kernels.lengths import lengths_of
from verify.kernels.numbers import type_of
from verify.kernels.plans.tile_options import TileOptions

# Offsets inside a tile are 32 bits wide (a tile has at most 128 keys), all others 64.
LARGEST_KEY_STRIDE = (1 << 31) // 256
# Cache types that the kernel reads itself, and bits of their codes.
FUSED_TYPES = {"q8_0": 8, "q4_0": 4}


def check_supported(call: Call) -> None:
    """Raises ValueError, naming the argument, for a dtype or a head size that the kernel does not have."""
    shape = call.shape
    if type_of(call.q.dtype) is None:
        raise ValueError(f"q: flash computes float16, bfloat16 and float32, got {call.q.dtype}")
    for name, size, largest in (("k", shape.k_size, LARGEST_K_HEAD), ("v", shape.v_size, LARGEST_V_HEAD)):
        if size % 8 or not SMALLEST_HEAD <= size <= largest:
            raise ValueError(
                f"{name}: flash has head sizes {SMALLEST_HEAD} to {largest} in steps of 8, got {size}"
            )


# Those that are read a whole row at a time, too: fp8, with a scale a KV head or one alone.
WIDE_TYPES = {**FUSED_TYPES, "e4m3": 8}
READERS = ("chunks", "wide", "swapped", "cuda")


def planes_of(k: Quantised, v: Quantised, reader: str = "chunks") -> Planes:
    """Planes of codes [B, Hkv, S, D] (4 bits: half as wide) and of scales [B, Hkv, D / 32, S]; for the other
    readers [B, Hkv, S, D / 32], of e4m3 [B, Hkv]."""
    planes = []
    for x in (k, v):
        assert x.scale is not None
        if x.type == "e4m3":
            codes = x.codes.permute(0, 2, 1, 3).contiguous().view(torch.int8)
            planes += [codes, x.scale.expand(len(codes), 1, codes.shape[1], 1).flatten(1).contiguous()]
            continue
        codes = x.codes.permute(0, 2, 1, 3)
        if WIDE_TYPES[x.type] == 4:
            half = codes.shape[-1] // 2
            codes = codes[..., :half] | codes[..., half:] << 4
        order = (0, 2, 3, 1) if reader == "chunks" else (0, 2, 1, 3)
        planes += [codes.contiguous(), x.scale.permute(*order).contiguous()]
    return Planes(
        k=CodeType(WIDE_TYPES[k.type], k.type == "e4m3"),
        k_codes=planes[0],
        k_scales=planes[1],
        v=CodeType(WIDE_TYPES[v.type], v.type == "e4m3"),
        v_codes=planes[2],
        v_scales=planes[3],
        reader=reader,
    )


def prepare(
    call: Call,
    options: TileOptions,
    tiles: Tiles,
    window_tiles: Tiles,
    *,
    overlap: bool = False,
    copy_engine: bool = False,
    cache_type: str = "f16",
) -> Prepared:
    """Plans and buffers of a call; overlap, copy_engine: what the device can; cache_type: what policies are
    told.

    Raises ValueError where head groups do not sum to r or are too large.
    """
    check_supported(call)
    shape, plan = call.shape, options.plan
    notes: list[str] = []
    call = _contiguous_enough(call, notes)
    # Rows that list their keys go through those.
    n_kv = call.n_kv
    lengths = lengths_of(n_kv).of_rows
    decode, tokens_a_tile = token_a_tile(call), tile_tokens(call, tiles)
    forms = forms_of(call, tokens_a_tile)
    packed_tiles = tuple((tile.first, tile.tokens) for tile in forms.packed)
    rows = plans_of_rows(plan, call.asked(cache_type), lengths, shape.rows, tokens_a_tile, packed_tiles)
    kv_len = n_kv.to(torch.int32).contiguous()
    launches = []
    for index, kind in enumerate(rows.kinds):
        if max(kind.head_groups) > LARGEST_GROUP:
            written = "+".join(map(str, kind.head_groups))
            raise ValueError(f"heads={written}: flash has groups of at most {LARGEST_GROUP} heads")
        mine = kv_len
        if len(rows.kinds) > 1:
            chosen = torch.tensor(rows.kind_of_row, device=kv_len.device).view(kv_len.shape) == index
            mine = torch.where(chosen, kv_len, -1)
        pieces = (
            chunks(call, kind.slots, tiles)
            if call.cu_seqlens is None
            else packed_chunks(call, kind.slots, forms, lengths)
        )
        same_length = _same_length(call, lengths) if len(rows.kinds) == 1 or decode else -1
        if not decode and any(piece.t != slice(None) for piece in pieces):
            same_length = -1
        parts, tiles_a_part = 0, 0
        if plan.kv.mode == "size":
            tiles_a_part = -(-plan.kv.value // plan.block)
        else:
            parts = plan.kv.parts_wanted(shape.kv_heads * len(kind.head_groups), plan.sms)
            if plan.kv.mode == "auto" and _all_have(rows, index, kind.slots):
                parts = kind.slots  # so that the device need not divide
            elif plan.kv.mode == "auto":
                tiles_a_part = -plan.kv.tiles_to_fill
        launches.append(
            Launches(
                head_groups=kind.head_groups,
                launch=kind.launch,
                parts=parts,
                tiles_a_part=tiles_a_part,
                slots=kind.slots,
                kv_len=mine,
                same_length=same_length,
                chunks=pieces,
            )
        )
    out = call.q.new_empty((shape.batch, shape.rows, shape.q_heads, shape.v_size), dtype=torch.float32)
    lse = out.new_empty((shape.batch, shape.rows, shape.q_heads))
    return Prepared(
        call=call,
        options=options,
        tiles=tiles,
        window_tiles=window_tiles,
        overlap=overlap,
        copy_engine=copy_engine,
        out=out,
        lse=lse,
        launches=launches,
        lengths=lengths,
        rows=rows,
        notes=notes,
        forms=forms,
    )


def _same_length(call: Call, lengths: tuple[int, ...]) -> int:
    """Keys of every row of a decode call, or on the path several of each sequence's newest, whose others have
    one less each; -1 where that does not say them all."""
    count = call.shape.rows
    if not lengths:
        return -1
    if token_a_tile(call):
        return lengths[0] if len(set(lengths)) == 1 else -1
    if call.path != "several" or call.cu_seqlens is not None or lengths[count - 1] < count:
        return -1
    one = range(lengths[count - 1] - count + 1, lengths[count - 1] + 1)
    return lengths[count - 1] if lengths == tuple(one) * call.shape.batch else -1


def _all_have(rows: RowPlans, kind: int, parts: int) -> bool:
    """Whether each row of a kind that has any keys has so many parts."""
    return all(len(plan.cuts) - 1 == parts for n_kv, plan, of in rows.counts if of == kind and n_kv > 0)


def _contiguous_enough(call: Call, notes: list[str]) -> Call:
    """The call with tensors whose last dimension is contiguous; a copy is noted."""
    changed: dict[str, Any] = {}
    for name in ("q", "k", "v"):
        x: torch.Tensor = getattr(call, name)
        if x.shape[3] > 1 and x.stride(3) != 1:
            changed[name] = x.contiguous()
            notes.append(f"{name}: strides {x.stride()} were copied to contiguous memory")
        elif x.stride(1) > LARGEST_KEY_STRIDE:
            raise ValueError(
                f"{name}: a stride of {x.stride(1)} numbers from key to key, flash reads at most"
                f" {LARGEST_KEY_STRIDE}"
            )
    for name in ("sinks", "alibi_slopes"):
        per_head = getattr(call, name)
        if per_head is not None:
            changed[name] = per_head.to(torch.float32).contiguous()
    return replace(call, **changed) if changed else call
