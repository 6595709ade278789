"""How near sums of a narrow type are to overflow: the largest partial sum of exp(s - m) v of a row and head.

A kernel that sums in float16 keeps a = sum over the keys so far of exp(s_j - m - c) v_j, m the largest logit
so far and c its offset on the maximum. It is infinite beyond 65,504, whatever the result would be. In the
order of an arithmetic, from one step of its sums to the next,

    A = max over parts, steps and columns of |sum exp(s_j - m) v_j|        (c = 0)
    headroom at offset c = 65504 e^c / A                                   below 1: it overflows

Where threads take every so many keys (`Arithmetic.sum_share`), as many keys next to each other stand for
theirs. Where no order is known it is one part of whole rows, 16 keys a step: the largest that is likely.
Rounding moves A by less than the budget of float16 sums. An offset costs P: what is below 2^-24 e^c of the
largest is lost, so c / ln 2 bits of its range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import linear_regression
from typing import NamedTuple

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import Call
from verify.kernels.exact import finish_logits
from verify.kernels.numbers import FP8_TYPES, MMA_KEYS
from verify.kernels.sequences import CallSequence, sequences

F16_LARGEST = 65504.0
E4M3_LARGEST = FP8_TYPES["e4m3"].largest
# Offsets that kernels have: none, ln 2, and llama.cpp's FATTN_KQ_MAX_OFFSET, which is not ln 8.
OFFSETS = (0.0, math.log(2.0), 3 * 0.6931)
# What is less than so many times below the overflow is too near: another text, another layer.
ENOUGH = 4.0
# Of a fit of lengths: fewer tell nothing, and how many deviations around it the interval goes.
_FEWEST_LENGTHS, _SIGMAS = 3, 3.0
# Logits, float64, held at once.
_AT_ONCE = 1 << 23


class RowHeadroom(NamedTuple):
    """Of each row and head [B, T, Hq], float64; 0 for a row without keys."""

    partial: torch.Tensor  # A, the largest partial sum of its numerator at offset 0
    logit: torch.Tensor  # the largest |logit|
    product: torch.Tensor  # the largest |q.k| before the scale
    value: torch.Tensor  # the largest |v| that it sees
    key: torch.Tensor  # the largest |k|


def row_headroom(call: Call, arithmetic: Arithmetic | None = None) -> RowHeadroom:
    """The figures of every row of a call, in the order of an arithmetic."""
    found = RowHeadroom(*(call.q.new_zeros(call.q.shape[:3], dtype=torch.float64) for _ in range(5)))
    for sequence in sequences(call):
        for t, n in enumerate(sequence.lengths):
            if n:
                b, rows = sequence.at
                for total, x in zip(found, _of_row(call, sequence, t, n, arithmetic), strict=True):
                    total[b, rows.start + t] = x
    return found


def _of_row(
    call: Call, sequence: CallSequence, t: int, n: int, arithmetic: Arithmetic | None
) -> Iterator[torch.Tensor]:
    """partial, logit, product, value and key, [Hq] each."""
    shape = call.shape
    heads, r = shape.kv_heads, shape.ratio
    q = sequence.q[t].double().view(heads, r, -1)
    k, v = (x[:n].double().transpose(0, 1) for x in (sequence.k, sequence.v))  # [Hkv, n, D]
    product = torch.einsum("hrd,hnd->hrn", q, k)
    positions = torch.arange(n, device=q.device)
    row = slice(t, t + 1)
    query_heads = torch.arange(shape.q_heads, device=q.device).view(heads, r)
    mask = sequence.mask_of(row, slice(0, n), query_heads, kv_heads=heads)
    s = finish_logits(call.scale * product[:, None], sequence.kv_len[row], positions, call, mask)[:, 0]
    seen = ~torch.isneginf(s)
    orders = ("forward",) if arithmetic is None else arithmetic.tile_orders
    largest = [
        _largest_partial(s, v, bounds, step, tile, backward=order == "backward")
        for order in orders
        for bounds, step, tile in _chains(n, arithmetic)
    ]
    yield torch.stack(largest).amax(0).flatten()
    yield torch.where(seen, s, 0.0).abs().amax(-1).flatten()
    yield torch.where(seen, product, 0.0).abs().amax(-1).flatten()
    for x in (v, k):
        of_key = x.abs().amax(-1)[:, None].expand(-1, r, -1)
        yield torch.where(seen, of_key, 0.0).amax(-1).flatten()


def _chains(n: int, a: Arithmetic | None) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Keys that one accumulator takes, how many a step, and how many a tile."""
    if a is None or a.block is None or a.cuts_at is None:
        yield (0, n), MMA_KEYS, MMA_KEYS
        return
    for first, end in pairwise(a.cuts_at(n)):
        keys = max(math.ceil(a.sum_share * (end - first)), 1)
        for start in range(first, end, keys):
            yield (start, min(start + keys, end)), min(a.sum_step, a.block), a.block


def _largest_partial(
    s: torch.Tensor, v: torch.Tensor, bounds: tuple[int, int], step: int, tile: int, *, backward: bool
) -> torch.Tensor:
    """[Hkv, r]: s [Hkv, r, n], v [Hkv, n, Dv]; the largest |partial sum| of the keys of some bounds.

    backward: the last tile is summed first.
    """
    s, v = s[..., bounds[0] : bounds[1]], v[:, bounds[0] : bounds[1]]
    if backward:
        room = -s.shape[-1] % tile
        s = torch.nn.functional.pad(s, (0, room), value=-math.inf).unflatten(-1, (-1, tile))
        v = torch.nn.functional.pad(v, (0, 0, 0, room)).unflatten(1, (-1, tile))
        s, v = s.flip(-2).flatten(-2), v.flip(1).flatten(1, 2)
    n = s.shape[-1]
    # Of the tile that a key lies in and of all before it.
    of_tile = torch.nn.functional.pad(s, (0, -n % tile), value=-math.inf).unflatten(-1, (-1, tile)).amax(-1)
    running = of_tile.cummax(-1).values.repeat_interleave(tile, -1)[..., :n]
    top = running[..., -1:]
    if bool(torch.isneginf(top).any()):
        top = torch.where(torch.isneginf(top), 0.0, top)
    # Far below the final maximum the early sums would underflow: 700 nats are float64's.
    p = torch.exp((s - top).clamp(min=-700.0))
    p = torch.where(torch.isneginf(s), 0.0, p)
    ends = torch.arange(step - 1, n + step - 1, step, device=s.device).clamp(max=n - 1).unique()
    scale = torch.exp((running - top).clamp(min=-700.0)[..., ends])  # [Hkv, r, steps]
    found = s.new_zeros(s.shape[:2])
    padded = torch.nn.functional.pad(p, (0, -n % step)).unflatten(-1, (-1, step))
    steps = padded.shape[2]
    values = torch.nn.functional.pad(v, (0, 0, 0, -n % step)).unflatten(1, (-1, step))
    at_once = max(_AT_ONCE // max(steps * v.shape[-1], 1), 1)
    for first in range(0, s.shape[1], at_once):
        rows = slice(first, first + at_once)
        sums = torch.einsum("hrsk,hskd->hrsd", padded[:, rows], values).cumsum(2)
        found[:, rows] = (sums.abs().amax(-1) / scale[:, rows]).amax(-1)
    return found


def headroom(partial: float, offset: float) -> float:
    """How many times larger sums may become before they overflow float16; infinite where all are 0."""
    return F16_LARGEST * math.exp(offset) / partial if partial > 0 else math.inf


def safe_offset(partial: float, times: float = ENOUGH) -> float:
    """The smallest offset on the maximum that leaves so many times the room, nats; 0 where none is needed."""
    return max(math.log(times * partial / F16_LARGEST), 0.0) if partial > 0 else 0.0


class Grown(NamedTuple):
    """The largest partial sum at a length that was not seen, and an interval of it."""

    n_kv: int
    partial: float
    low: float
    high: float


def grown_to(seen: Sequence[tuple[int, float]], n_kv: int) -> Grown | None:
    """What largest partial sums of some lengths, (n_kv, A), say of a longer one; None for fewer than three.

    ln A is fitted by a line in ln n_kv, whose slope is held between 0 and 1: sums grow no slower than not at
    all, and no faster than their keys do. The interval is three standard errors of a new observation.
    """
    told = [(math.log(n), math.log(a)) for n, a in seen if a > 0]
    if len({x for x, _ in told}) < _FEWEST_LENGTHS:
        return None
    x, y = zip(*told, strict=True)
    slope = min(max(linear_regression(x, y).slope, 0.0), 1.0)
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    left = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in told)
    sd = math.sqrt(left / max(len(told) - 2, 1))
    at = math.log(n_kv)
    error = _SIGMAS * sd * math.sqrt(1 + 1 / len(told) + (at - mean_x) ** 2 / spread)
    middle = mean_y + slope * (at - mean_x)
    return Grown(n_kv, *(math.exp(z) for z in (middle, middle - error, middle + error)))


class HeadroomPlace(NamedTuple):
    """Where a figure is the largest, and how large it is there."""

    value: float
    at: str  # in words


def headroom_sentences(
    order: str,
    partial: HeadroomPlace,
    logit: HeadroomPlace,
    value: HeadroomPlace,
    longer: Grown | None,
    *,
    fp8: bool,
) -> list[str]:
    """What largest figures amount to. order: whose order of summation it is; fp8: P or caches are e4m3."""
    room = [f"{headroom(partial.value, c):.3g}" for c in OFFSETS]
    said = [
        f"headroom of float16 sums: the largest partial sum of P V is {partial.value:.4g} ({partial.at}, in"
        f" the order of {order}), {room[0]} times below 65,504; {room[1]} times with an offset of ln 2 on the"
        f" maximum, {room[2]} times with 3 x 0.6931"
    ]
    if longer is not None:
        most, least = (headroom(x, 0.0) for x in (longer.low, longer.high))
        said[0] += (
            f"; at {longer.n_kv} keys {headroom(longer.partial, 0.0):.3g} times ({least:.3g} to {most:.3g})"
        )
    said.append(f"largest |logit| {logit.value:.4g} ({logit.at}), {_room(logit.value, F16_LARGEST)} 65,504")
    if fp8:
        said.append(
            f"largest |v| {value.value:.4g} ({value.at}), {_room(value.value, E4M3_LARGEST)} e4m3's 448"
        )
    if headroom(partial.value, 0.0) < ENOUGH:
        c = safe_offset(partial.value)
        said.append(
            f"warning: float16 sums without an offset are less than {ENOUGH:g} times below their overflow; an"
            f" offset of {c:.3g} leaves {ENOUGH:g} times, and costs {c / math.log(2):.2g} bits of P's range"
        )
    return said


def _room(value: float, largest: float) -> str:
    return f"{largest / value:.3g} times below" if value > 0 else "far below"
