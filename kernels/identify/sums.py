"""How the second product is summed: bits of its accumulators, their rounding, and the tiles of keys.

All keys that are asked have the logit 0 and all others no weight, so that every P is the same number. M at
key i, -M at key j and a small u at key t between them: the sum is u if the accumulator that holds M can take
u, and 0 if not. M is not a power of two and its last place is even, so that half of it is lost where sums
round to nearest, and three quarters become a whole one; where they truncate both are lost.

Where M and -M stand next to each other (i, i + 1) and u comes before them, u is kept if both lie in one
product that is summed before it is added, and lost where a product ends between them: the products' edges.

Sums of 11 bits are float16's where many keys of 60,000 overflow them, however P was made smaller, or where
they have float16's least steps, 2^-24; TF32's range is float32's. Where neither can be told they are called
float16, the looser of the two. How many keys such a sum takes is counted: M at one key and u at all others,
so small that all of them together are lost beside M; what is left of them was summed elsewhere, whatever the
order.

The tile over which the maximum is taken shows as well. P of a key is rounded relative to the largest logit of
its tile; one of an earlier tile was 1 there, and is scaled afterwards, not rounded. And float16 sums overflow
in an earlier tile, where two keys of 60,000 are summed before a larger logit makes them small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from verify.kernels.identify.asking import LARGE, Asking, ValueColumns, at_keys, columns, together
from verify.kernels.identify.weights import AskedPart, Weights, cancelling, ratios

# Exponent of the last place of LARGE at b bits is 16 - b.
_TOP = 15
_LEAST_BITS, _MOST_BITS = 3, 39
# More keys than any tile: so many are looked at where one is looked for.
PROBED_KEYS = 1100
# Sums of so few bits are narrow: how many keys they take decides what they may err by.
_NARROW = 11
# Keys of 61,440 of which sums of float16 overflow, whatever the offset.
_BURST = 1024
# Pairs of numbers that must tell two types apart.
_FEW_TELL = 8
# Rows in which keys of a sum are counted, and in how many places; bits of a result that shows it.
_COUNT_FROM, _COUNTS, _RESULT_BITS = 256, 16, 23
# More keys than any product.
_LARGEST_PRODUCT = 129
# How far below the largest a logit may lie, in nats, for P to be a normal number; 9.7 where not said.
_NORMAL = {"e4m3": 4.1}


Earlier = Callable[[int, list[int]], list[bool]]


# Of a probe that would have shown the edge of a tile within a part, and did not.
NO_EDGE = "no edge within a part"


class SumsSeen(NamedTuple):
    """What was seen of the second product."""

    bits: int | None  # of the accumulators, leading one included; None: more than can be told (40)
    truncated: bool | None  # they round toward zero
    overflows: bool  # sums beyond 65,504 are infinite
    wide: bool  # sums of 11 bits have a wider range than float16: it was seen
    tile_bits: int | None  # `bits` within one tile
    product: int | None  # keys of a product that is summed before it is added; None: none was seen to end
    counted: tuple[int, ...]  # keys that a sum of 11 bits or fewer takes, where it was counted
    tile: int | None  # keys over which the maximum is taken
    how: str  # the probe that showed the tile


def sums_seen(ask: Asking, part: tuple[int, int], weights: Weights) -> SumsSeen:
    """part: bounds of the longest part."""
    first, end = part
    keys = end - first
    far = [
        (first, first + keys // 2, end - 1),
        (first, first + keys // 3, end - 1),
        (first, end - 2, end - 1),
    ]
    strided = [(first, first + step, first + 2 * step) for step in (1, 2, 16, 64, 256) if 2 * step < keys]
    bits, truncated = _bits(ask, [*far, *strided])
    overflows = _overflows(ask, part)
    narrow = bits is not None and bits <= _NARROW
    wide = narrow and not overflows and _has_wide_range(ask, part, weights) is True
    product = _product(ask, part, bits)
    if narrow and product is None and bits is not None:
        product = _first_product(ask, part, bits)
    tile, how = None, ""
    if overflows:
        tile, how = (
            _tile(ask, part, lambda x, ys: _overflowed(ask, x, ys, weights), _burst(weights)),
            "overflow",
        )
    elif weights.p not in ("f32", None) and not weights.normalised:
        pair = _telling_pair(ask, part, weights)
        tile, how = _tile(ask, part, lambda x, ys: _unrounded(ask, x, ys, pair)), "rounding of P"
    if how and tile is None:
        how = NO_EDGE
    if tile is None and product is not None and not overflows:
        tile, how = product, "order of sums"
    tile_bits = bits
    if tile is not None and 2 < tile < keys:
        inside = [(first, first + tile // 2, first + tile - 1), (first, first + 1, first + 2)]
        inside += [(first, first + s, first + 2 * s) for s in (16, 32) if 2 * s < tile]
        tile_bits, _ = _bits(ask, inside)
    if overflows and not narrow:
        # One product of all keys in more bits: it is rounded to float16 where it is added.
        bits, tile_bits = _NARROW, bits
    return SumsSeen(
        bits=bits,
        truncated=truncated,
        overflows=overflows,
        wide=wide,
        tile_bits=tile_bits,
        product=product,
        counted=_counted(ask, part, bits) if narrow else (),
        tile=tile,
        how=how,
    )


def _bits(ask: Asking, places: list[tuple[int, int, int]]) -> tuple[int | None, bool | None]:
    """The fewest bits of a sum that runs from i over t to j, and whether it truncates."""
    bits: int | None = None
    truncated: bool | None = None
    places = [place for place in dict.fromkeys(places) if place[0] < place[1] < place[2]]
    # From the largest that float16 holds beside LARGE.
    wholes = [2.0 ** (_TOP + 1 - b) for b in range(_LEAST_BITS, _MOST_BITS + 1)]
    units = [*wholes, *(0.75 * u for u in wholes)]
    n, units_at = len(wholes), torch.tensor(units, dtype=torch.float64)
    # All places share their keys' logits, and so a call.
    keys = _power_of_two(sorted({key for place in places for key in place}), ask.regime.n_kv)
    values = columns([{i: LARGE, t: u, j: -LARGE} for i, t, j in places for u in units])
    seen = ask.weigh(ask.level(keys), values)[0] * len(keys) if places else torch.empty(0)
    for found in seen.split(len(units)):
        kept = (found.abs() > 0.25 * units_at) & torch.isfinite(found)
        lost = (~kept[:n]).nonzero().flatten().tolist()
        if not lost or lost[0] == 0 or (bits is not None and lost[0] + _LEAST_BITS - 1 >= bits):
            continue
        bits = lost[0] + _LEAST_BITS - 1
        # Three quarters of the last place that is kept.
        truncated = not bool(kept[n + lost[0] - 1])
    return bits, truncated


def _power_of_two(keys: list[int], n_kv: int) -> list[int]:
    """These keys and others, to a power of two, if there are so many: P is exact then, though it be divided
    by l."""
    wanted = 1 << (len(keys) - 1).bit_length()
    taken = set(keys)
    others = (key for key in range(n_kv - 1, -1, -1) if key not in taken)
    return [*keys, *itertools.islice(others, wanted - len(keys))]


def _overflows(ask: Asking, part: tuple[int, int]) -> bool:
    """Whether a sum beyond 65,504 becomes infinite where the result itself would not be."""
    first, end = part
    # So many that no offset hides it.
    count = min(3 * (end - first) // 4, _BURST)
    keys = list(range(first, first + count))
    # A quarter of the weight lies on keys whose values are 0; P of all is the same.
    still = list(range(first + count, min(first + 4 * count // 3 + 1, end)))
    values = [dict.fromkeys(keys, 61440.0), dict.fromkeys(keys, 61440.0 / (2 * _BURST))]
    found = ask.weigh(ask.level([*keys, *still]), columns(values))[0]
    return not bool(torch.isfinite(found[0])) and bool(torch.isfinite(found[1]))


def _has_wide_range(ask: Asking, part: tuple[int, int], weights: Weights) -> bool | None:
    """Whether a sum holds what float16, whose least step is 2^-24, does not; None where it cannot be told.

    A few steps, times P between 1/5 and 1: float16 sums round that to whole steps, before they are divided by
    l or, where P was, after. A result of float16 has the same steps: only what differs in it as well tells.
    """
    gaps = torch.arange(8, 48, 2, dtype=torch.float64) / 32
    steps = torch.arange(1, 8, dtype=torch.float64)
    logits = torch.cat([ask.level([part[0]]) for _ in gaps])
    logits[:, part[0] + 1] = -gaps
    least = 2.0**-24
    seen = ask.weigh(logits, at_keys(part[0] + 1, steps * least)) / least
    p, l = torch.exp(-gaps)[:, None], (1 + torch.exp(-gaps))[:, None]
    exact, smaller = steps * p / l, math.exp(-(weights.offset or 0.0))
    divided, undivided = exact.round(), (steps * p * smaller).round() / smaller / l
    # Of P that could not be told it is not known either whether it was divided.
    if weights.p is None:
        possible = [divided, undivided]
    else:
        possible = [divided if weights.normalised else undivided]
    if bool((seen == seen.round()).all()):
        exact, possible = exact.round(), [x.round() for x in possible]
    off = torch.stack([(exact - x).abs() for x in possible]).amin(0)
    tell = off > 0.2
    if int(tell.sum()) < _FEW_TELL:
        return None
    is_wide = ((seen - exact).abs() < off / 2)[tell]
    return float(is_wide.double().mean()) > 0.9


def _counted(ask: Asking, part: tuple[int, int], bits: int | None) -> tuple[int, ...]:
    """How many keys each of some sums takes, one key's of each; empty where the result hides it.

    P of all keys is the same. M alone and M beside small numbers at all other keys, together half of M's last
    place: the results' ratio is 1 + kept / M, whatever l is.
    """
    n = ask.regime.n_kv
    if bits is None or n < _COUNT_FROM:
        return ()
    u = 2.0 ** (_TOP - bits - math.ceil(math.log2(n)))
    # Not the first ones of tiles alone.
    at = sorted({(n - 1) * i // (_COUNTS - 1) for i in range(_COUNTS)} | {part[0]})[: ask.regime.columns // 2]
    every = torch.arange(n)
    alone = [columns([{i: LARGE}]) for i in at]
    beside = [
        ValueColumns(every, torch.zeros(n, dtype=torch.int64), torch.where(every == i, LARGE, u).double(), 1)
        for i in at
    ]
    found = ask.weigh(ask.level(every), together([*alone, *beside]))[0]
    kept = (found[len(at) :] / found[: len(at)] - 1) * LARGE / u
    # A 16-bit result does not show them: none of all seems kept, or whole places of it.
    lost = n - kept
    step = 2.0**-_RESULT_BITS * LARGE / u
    if not bool(torch.isfinite(lost).all()) or _is_coarse(found[len(at) :]):
        return ()
    return tuple(min(n, max(1, math.ceil(x + 2 * step))) for x in lost.tolist())


def _is_coarse(x: torch.Tensor) -> bool:
    """Whether all are numbers of 11 bits."""
    mantissa = torch.frexp(x).mantissa * 2.0**11
    return bool((mantissa == mantissa.round()).all())


def _burst(weights: Weights) -> int:
    """How many keys of 61,440 overflow float16, at the offset that P has."""
    return int(65504 / (61440 * math.exp(-(weights.offset or 0.0)))) + 1


def _first_product(ask: Asking, part: tuple[int, int], bits: int) -> int:
    """Keys of the part's first product: M at its first key, u beside it and -M at a later one, which cancel
    where all three are summed before they are added."""
    first, end = part
    far = list(range(first + 2, min(end, first + _LARGEST_PRODUCT + 1)))
    u = 2.0 ** (_TOP - bits - 1)
    keys = _power_of_two([first, first + 1, *far], ask.regime.n_kv)
    values = columns([{first: LARGE, first + 1: u, j: -LARGE} for j in far])
    found = ask.weigh(ask.level(keys), values)[0] * len(keys)
    kept = (found.abs() > u / 2).tolist()
    return next((2 + i for i, x in enumerate(kept) if not x), 2 + len(kept)) if kept and kept[0] else 1


def _product(ask: Asking, part: tuple[int, int], bits: int | None) -> int | None:
    """Keys of a product that is summed by itself: the distance of two edges."""
    if bits is None:
        return None
    first, end = part
    last = min(end - 1, first + PROBED_KEYS)
    u = 2.0 ** (_TOP - bits - 1)
    lost = []
    at = list(range(first + 1, last))
    for start in range(0, len(at), ask.regime.columns):
        some = at[start : start + ask.regime.columns]
        keys = _power_of_two(sorted({first, *some, *(i + 1 for i in some)}), ask.regime.n_kv)
        values = columns([{first: u, i: LARGE, i + 1: -LARGE} for i in some])
        found = ask.weigh(ask.level(keys), values)[0] * len(keys)
        lost += [i for i, x in zip(some, (found.abs() < u / 2).tolist(), strict=True) if x]
        edges = _edges(lost, first)
        if len(edges) > 2 and edges[-1] < some[-1]:
            break
    edges = [edge for edge in _edges(lost, first) if edge < at[-1]]
    # In the first product lies u itself; where there are others, they tell.
    if len(edges) < 3:
        edges = [first - 1, *edges]
    steps = [b - a for a, b in itertools.pairwise(edges)]
    # Within the first product vector units may have an order of their own beside u.
    after = [edge for edge in edges if edge >= first - 1 + steps[-1]] if steps else []
    if len(after) > 2:
        steps = [b - a for a, b in itertools.pairwise(after)]
    return steps[0] if len(set(steps)) == 1 else None


def _edges(lost: list[int], first: int) -> list[int]:
    """Last keys of products after the first one, in which u itself lies."""
    edges, previous = [], None
    for i in lost:
        if previous is None or i > previous + 1:
            edges.append(i)
        else:
            edges[-1] = i
        previous = i
    return edges


def _tile(ask: Asking, part: tuple[int, int], test: Earlier, spare: int = 1) -> int | None:
    """Keys of a tile: the distance of two of its edges below one another, each found by halving.

    test(x, ys): whether keys ys lie in tiles before that of key x; of `spare` first keys it cannot tell.
    """
    first, end = part
    low = first + spare
    x = min(end - 1, first + PROBED_KEYS)
    starts: list[int] = []
    while len(starts) < 3 and x > low:
        start = _start_of(ask, low, x, test)
        if start is None:
            # It is the part's first tile.
            starts += [first] if starts else []
            break
        starts.append(start)
        x = start - 1
    if len(starts) < 2:
        return None
    # The first of them may have been looked for from within a tile.
    sizes = {a - b for a, b in itertools.pairwise(starts)}
    return sizes.pop() if len(sizes) == 1 else None


def _start_of(ask: Asking, low0: int, x: int, test: Earlier) -> int | None:
    """The first key of the tile that key x lies in, unless key low0 does too."""
    low, high = low0 - 1, x
    while high - low > 1:
        count = min(high - low - 1, ask.regime.columns)
        # The first time from low0 on, and that one itself.
        ys = sorted({low + 1 + (high - low - 1) * i // count for i in range(count)})
        is_earlier = test(x, ys)
        low = max([low, *(y for y, e in zip(ys, is_earlier, strict=True) if e)])
        if low < low0:
            return None
        high = min([high, *(y for y, e in zip(ys, is_earlier, strict=True) if not e and y > low)])
    return high if low0 < x else None


def _overflowed(ask: Asking, x: int, ys: list[int], weights: Weights) -> list[bool]:
    """Whether keys up to y are summed before key x, of a larger logit, is seen. False below the first few."""
    burst = _burst(weights)
    logits = ask.level([x], at=4.0)
    logits[0, :x] = 0.0
    values = columns([{y - i: 61440.0 for i in range(burst) if y >= i} for y in ys])
    return (~torch.isfinite(ask.weigh(logits, values)[0])).tolist()


class _Pair(NamedTuple):
    """Two keys g apart: the values that cancel, and what their P is off by, relative, where the smaller one
    is rounded and where it is not."""

    g: float
    v_a: float
    v_b: float
    if_rounded: float
    if_not: float


def _telling_pair(ask: Asking, part: tuple[int, int], weights: Weights) -> _Pair:
    """Of many g, one whose P is rounded far, as keys show that come after the larger one. Not as far as can
    be: there an exponential that is 1e-4 off, as that of another loop may be, would turn it."""
    # Farther apart than a maximum that lags behind may lie, as far as P is not subnormal.
    most = min(_NORMAL.get(weights.p or "", 9.7) - (weights.offset or 0.0), 9.7)
    gaps = torch.round((most - 0.1 - torch.arange(48, dtype=torch.float64) / 16) * 16) / 16
    gaps = gaps[gaps >= 0.25]
    seen = ratios(ask, AskedPart(*part), gaps) * torch.exp(gaps) - 1
    smooth = torch.expm1(-gaps * weights.slope)
    p = torch.exp(-gaps - (weights.offset or 0.0))
    bits = {"bf16": 8, "e4m3": 4, "e5m2": 3}.get(weights.p or "", 11)
    # In steps of P: a half is a tie.
    steps = (seen - smooth).abs() * p * torch.exp2(bits - torch.frexp(p).exponent.double())
    best = torch.where((steps % 1 > 0.2) & (steps % 1 < 0.4), (seen - smooth).abs(), 0.0).argmax()
    v_a, v_b = cancelling(torch.exp(-gaps[best : best + 1]), 11 if ask.regime.dtype != torch.bfloat16 else 8)
    return _Pair(float(gaps[best]), float(v_a), float(v_b), float(seen[best]), float(smooth[best]))


def _unrounded(ask: Asking, x: int, ys: list[int], pair: _Pair) -> list[bool]:
    """Whether P of keys ys is not rounded relative to key x, which has a larger logit."""
    logits = ask.level([x])
    logits[0, ys] = -pair.g
    found = ask.weigh(logits, columns([{y: pair.v_a, x: pair.v_b} for y in ys]))[0]
    a = pair.v_a * math.exp(-pair.g)
    off = (found * (1 + len(ys) * math.exp(-pair.g)) - (a + pair.v_b)) / a
    return ((off - pair.if_not).abs() < abs(pair.if_rounded - pair.if_not) / 2).tolist()
