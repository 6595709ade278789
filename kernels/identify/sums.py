"""How the second product is summed: bits of its accumulators, their rounding, and the keys of a product.

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
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch

from verify.kernels.identify.asking import (
    LARGE,
    PROBED_KEYS,
    Asking,
    ValueColumns,
    at_keys,
    columns,
    together,
)
from verify.kernels.identify.tiles import TilesSeen, tiles_by_overflow, tiles_by_rounding
from verify.kernels.identify.weights import Weights

# Exponent of the last place of LARGE at b bits is 16 - b.
_TOP = 15
_LEAST_BITS, _MOST_BITS = 3, 39
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


class SumsSeen(NamedTuple):
    """What was seen of the second product."""

    bits: int | None  # of the accumulators, leading one included; None: more than can be told (40)
    truncated: bool | None  # they round toward zero
    overflows: bool  # sums beyond 65,504 are infinite
    wide: bool  # sums of 11 bits have a wider range than float16: it was seen
    tile_bits: int | None  # `bits` within one tile, or one product where no tile was seen
    product: int | None  # keys of a product that is summed before it is added; None: none was seen to end
    counted: tuple[int, ...]  # keys that a sum of 11 bits or fewer takes, where it was counted
    tiles: TilesSeen  # over which the maximum is taken


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
    tiles = TilesSeen(None, None, "")
    if overflows:
        tiles = tiles_by_overflow(ask, part, weights)
    elif weights.p not in ("f32", None) and not weights.normalised:
        tiles = tiles_by_rounding(ask, part, weights)
    product = None
    if bits is not None:
        product = _product(ask, part, bits, tiles.order or _order(ask, part, bits), tiles.keys)
        if narrow and product is None:
            product = _first_product(ask, part, bits)
    # Where nothing shows a tile, keys of a product are summed in one as well.
    tile = tiles.keys or (None if overflows else product)
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
        tiles=tiles,
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


def _order(ask: Asking, part: tuple[int, int], bits: int) -> str | None:
    """In which order keys far from each other are summed: u is lost beside M, unless M and -M cancel before.
    None where it is kept, or lost, either way."""
    first, end = part
    middle, last = (first + end) // 2, end - 1
    u = 2.0 ** (_TOP - bits - 1)
    keys = _power_of_two([first, middle, last], ask.regime.n_kv)
    values = columns([{first: LARGE, middle: -LARGE, last: u}, {last: LARGE, middle: -LARGE, first: u}])
    found = ask.weigh(ask.level(keys), values)[0] * len(keys)
    forward, backward = (found.abs() > u / 2).tolist()
    return None if forward == backward else "forward" if forward else "backward"


def _product(
    ask: Asking, part: tuple[int, int], bits: int, order: str | None, tile: int | None
) -> int | None:
    """Keys of a product that is summed by itself: the distance of two edges.

    order: in which far keys are summed: u must come before M. tile: its keys, where they are known.
    """
    first, end = part
    last = min(end - 1, first + PROBED_KEYS)
    near = (last - first) // 2
    u = 2.0 ** (_TOP - bits - 1)
    if tile is not None:
        near = min(near, tile)
    # Beside u itself, in its product, vector units have an order of their own: keys far from it come first.
    before, windows = first, [range(first + near, last), range(first + 1, first + near)]
    if order == "backward":
        before, windows = end - 1, [range(first, min(end - 1 - near, last))]
    at: list[int] = []
    lost: list[int] = []
    edges: list[int] = []
    batches = [
        (is_far, window[i : i + ask.regime.columns])
        for is_far, window in zip((True, False), windows, strict=False)
        for i in range(0, len(window), ask.regime.columns)
    ]
    for is_far, some in batches:
        keys = _power_of_two(sorted({before, *some, *(i + 1 for i in some)}), ask.regime.n_kv)
        values = columns([{before: u, i: LARGE, i + 1: -LARGE} for i in some])
        found = ask.weigh(ask.level(keys), values)[0] * len(keys)
        at = sorted([*at, *some])
        lost = sorted([*lost, *(i for i, x in zip(some, (found.abs() < u / 2).tolist(), strict=True) if x)])
        edges = [edge for edge in _edges(lost) if edge < at[-1]]
        if is_far and len(edges) > 2:
            break
    # In the first product lies u itself; where there are others, they tell.
    if len(edges) < 3:
        edges = [first - 1, *edges]
    steps = [b - a for a, b in itertools.pairwise(edges)]
    # Within the first product vector units may have an order of their own beside u.
    after = [edge for edge in edges if edge >= first - 1 + steps[-1]] if steps else []
    if len(after) > 2:
        steps = [b - a for a, b in itertools.pairwise(after)]
    return steps[0] if len(set(steps)) == 1 else None


def _edges(lost: list[int]) -> list[int]:
    """Last keys of products: of runs of keys of which u is lost."""
    edges, previous = [], None
    for i in lost:
        if previous is None or i > previous + 1:
            edges.append(i)
        else:
            edges[-1] = i
        previous = i
    return edges
