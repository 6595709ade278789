"""Whether the arguments of a call fit together: each message names the argument and the place in it.

What a writer of caches must not do is refused too, as far as a call shows it: a page that one sequence has
twice holds the keys of two places, of which one was written over the other; packed sequences that overlap
would write the same rows of the result.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from verify.kernels.lengths import lengths_of
from verify.kernels.plans.asked import MOST_SEVERAL

if TYPE_CHECKING:
    from verify.kernels.call import Call

INPUT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.int32, torch.int64)


def check_call(call: Call) -> None:
    """Raises ValueError naming the argument, what it is and what was expected."""
    _check_tensors(call)
    _check_sequences(call)
    _check_lengths(call)
    _check_options(call)
    if call.block_table is not None:
        _check_table(call, call.block_table)
    if call.mask is not None:
        _check_mask(call, call.mask)
    if call.keys is not None:
        _check_keys(call, call.keys)


def _check_tensors(call: Call) -> None:
    q, k, v = call.q, call.k, call.v
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, T, H, D], got shape {list(x.shape)}")
        if x.dtype not in INPUT_TYPES:
            raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")
    for name in ("k", "v", "mask", "keys", "block_table", "cu_seqlens"):
        x = getattr(call, name)
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: on device {x.device}, q is on {q.device}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")


def _check_sequences(call: Call) -> None:
    """Heads, head sizes, and how many sequences there are, whatever form they have."""
    q, k, v, table, starts = call.q, call.k, call.v, call.block_table, call.cu_seqlens
    batch, rows, q_heads, k_size = q.shape
    for name, x in (("block_table", table), ("cu_seqlens", starts)):
        if x is not None and (x.dtype not in _WHOLE or x.dim() != (2 if name == "block_table" else 1)):
            wanted = "[B, pages]" if name == "block_table" else "[B + 1]"
            raise ValueError(f"{name}: expected {wanted} int32, got {list(x.shape)} {x.dtype}")
    if starts is not None:
        if batch != 1 or not len(starts):
            raise ValueError(
                "q, cu_seqlens: expected packed tokens [sum T, Hq, Dk] and [B + 1] numbers, got"
                f" {list(q.shape)} and {len(starts)}"
            )
        _check_starts(starts.tolist(), rows)
    count = call.sequences
    if table is None and (k.shape[0] != count or v.shape[0] != count):
        raise ValueError(f"k, v: expected batch {count} as q has, got {k.shape[0]} and {v.shape[0]}")
    if table is not None and table.shape[0] != count:
        raise ValueError(f"block_table: expected a row for each of {count} sequences, got {table.shape[0]}")
    if k.shape[3] != k_size:
        raise ValueError(f"k: expected head size {k_size} as q has, got {k.shape[3]}")
    if k.shape[:3] != v.shape[:3]:
        held = "[B, S, Hkv]" if table is None else "[P, page, Hkv]"
        raise ValueError(f"v: expected {held} = {list(k.shape[:3])} as k has, got {list(v.shape[:3])}")
    if table is not None and k.shape[1] == 0:
        raise ValueError("k: expected pages of at least one key, got pages of 0")
    kv_heads = k.shape[2]
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"q: {q_heads} query heads are not a multiple of {kv_heads} KV heads")


def _check_starts(starts: list[int], rows: int) -> None:
    if starts[0] != 0:
        raise ValueError(f"cu_seqlens: expected to begin with 0, got {starts[0]}")
    for b, (start, end) in enumerate(pairwise(starts)):
        if end < start:
            raise ValueError(
                f"cu_seqlens: falls from {start} to {end} at [{b + 1}]: rows of two sequences would overlap"
            )
    if starts[-1] != rows:
        raise ValueError(f"cu_seqlens: ends with {starts[-1]}, expected the {rows} tokens of q")


def _check_lengths(call: Call) -> None:
    kv_len, rows = call.kv_len, list(call.q.shape[:2])
    if list(kv_len.shape) != rows:
        raise ValueError(f"kv_len: expected shape [B, T] = {rows}, got {list(kv_len.shape)}")
    if kv_len.dtype not in _WHOLE:
        raise ValueError(f"kv_len: expected int32, got {kv_len.dtype}")
    if kv_len.numel():
        lengths = lengths_of(kv_len)
        low, high, most = lengths.least, lengths.greatest, call.shape.keys
        if call.block_table is not None and high > most:
            place = _first(kv_len > most)
            raise ValueError(
                f"kv_len: {int(kv_len[tuple(place)])} at {place} is beyond the table, which has"
                f" {call.block_table.shape[1]} pages of {call.k.shape[1]} keys"
            )
        if low < 0 or high > most:
            raise ValueError(f"kv_len: expected values from 0 to S = {most}, got {low} to {high}")


def _check_options(call: Call) -> None:
    if call.path == "several":
        tokens = [call.q.shape[1]] if call.cu_seqlens is None else call.cu_seqlens.diff().tolist()
        for b, n in enumerate(tokens):
            if n > MOST_SEVERAL:
                raise ValueError(
                    f"q: {n} query tokens of sequence {b}, expected at most {MOST_SEVERAL} on path several"
                )
    if call.sliding_window is not None and call.sliding_window <= 0:
        raise ValueError(f"sliding_window: expected at least 1, got {call.sliding_window}")
    if call.softcap is not None and not call.softcap > 0:
        raise ValueError(f"softcap: expected a positive number, got {call.softcap}")
    q_heads = call.q.shape[2]
    for name, per_head in (("sinks", call.sinks), ("alibi_slopes", call.alibi_slopes)):
        if per_head is not None and list(per_head.shape) != [q_heads]:
            raise ValueError(f"{name}: expected shape [Hq] = [{q_heads}], got {list(per_head.shape)}")


def _check_table(call: Call, table: torch.Tensor) -> None:
    """Entries that some row needs: each names a page, and no sequence has one twice."""
    pages, page = call.k.shape[:2]
    if not table.numel():
        return
    needed = torch.zeros(call.sequences, dtype=torch.int64, device=table.device)
    for b, rows in enumerate(call.rows_of_sequences()):
        lengths = call.kv_len[rows]
        needed[b] = -(-int(lengths.max()) // page) if lengths.numel() else 0
    places = torch.arange(table.shape[1], device=table.device)
    used = places < needed[:, None]
    nowhere = used & ((table < 0) | (table >= pages))
    if bool(nowhere.any()):
        place = _first(nowhere)
        raise ValueError(
            f"block_table: {int(table[tuple(place)])} at {place} names no page, expected 0 to {pages - 1}"
        )
    # What is not used is made unlike anything else.
    ids = torch.where(used, table.long(), -1 - places).sort(1).values
    again = ids[:, 1:] == ids[:, :-1]
    if bool(again.any()):
        b, i = _first(again)
        raise ValueError(
            f"block_table: page {int(ids[b, i])} is twice in row {b}: there keys of two places would be"
            " written over each other"
        )


def _check_mask(call: Call, mask: torch.Tensor) -> None:
    batch, rows, heads = call.q.shape[:3]
    keys = call.shape.keys
    good = mask.dim() == 4 and list(mask.shape[2:]) == [rows, keys]
    if not good or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
        raise ValueError(
            f"mask: expected shape [{batch} or 1, {heads} or 1, {rows}, {keys}], got {list(mask.shape)}"
        )
    if mask.dtype == torch.bool:
        return
    if not mask.dtype.is_floating_point:
        raise ValueError(f"mask: expected bool, or numbers to add to logits, got {mask.dtype}")
    odd = torch.isnan(mask) | torch.isposinf(mask)
    if bool(odd.any()):
        place = _first(odd)
        raise ValueError(f"mask: {float(mask[tuple(place)])} at {place}, expected finite numbers or -inf")


def _check_keys(call: Call, keys: torch.Tensor) -> None:
    rows = list(call.q.shape[:2])
    if keys.dim() != 3 or list(keys.shape[:2]) != rows or keys.dtype not in _WHOLE:
        raise ValueError(
            f"keys: expected shape [{rows[0]}, {rows[1]}, K] int32, got {list(keys.shape)} {keys.dtype}"
        )
    beyond = (keys < -1) | (keys >= call.kv_len[..., None])
    if bool(beyond.any()):
        place = _first(beyond)
        seen = int(call.kv_len[tuple(place[:2])])
        raise ValueError(
            f"keys: {int(keys[tuple(place)])} at {place}, expected -1 or one of the row's {seen} keys"
        )
    ordered = keys.sort(-1).values
    again = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if bool(again.any()):
        b, t, i = _first(again)
        raise ValueError(f"keys: key {int(ordered[b, t, i])} is twice in the list at [{b}, {t}]")


def _first(wrong: torch.Tensor) -> list[int]:
    """The place of the first element that is wrong."""
    found: list[int] = wrong.nonzero()[0].tolist()
    return found
