"""The tiles of keys over which the maximum is taken, and the order in which a part's tiles are walked.

P of a key is rounded relative to the largest logit that was seen when its tile was summed; one of an earlier
tile was 1 there, and is scaled afterwards, not rounded. And float16 sums overflow in an earlier tile, where
two keys of 60,000 are summed before a larger logit makes them small.

Which tiles are earlier, mirrored pairs of keys tell: a smaller first key of a part and a larger last one, a
larger first one and a smaller last one. Walked forward the first pair alone is apart, walked backward (as
FlashAttention does) the second; where both are, keys far from each other keep a maximum each, and where
neither is, a tile holds the whole part. The two lie farther apart than a maximum that lags behind may.
Ends alone would call any order a walk (the last tile first and then forward, even tiles before odd ones):
what was found must say of keys from all over the part, too, which are earlier, or it is not said.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from verify.kernels.identify.asking import PROBED_KEYS, Asking, columns
from verify.kernels.identify.weights import AskedPart, Weights, cancelling, ratios

# How far below the largest a logit may lie, in nats, for P to be a normal number; 9.7 where not said.
_NORMAL = {"e4m3": 4.1}
# Logits farther apart than a maximum that lags behind may lie: by 8 in base 2 in FlashAttention 4.
_BEYOND_LAGS = 9.0
# Of a probe that would have shown the edge of a tile within a part, and did not.
NO_EDGE = "no edge within a part"
_UNEVEN = "edges at uneven distances"
_NO_WALK = "tiles in no order that shows"
# Where keys lie, as shares of a part, beside which all others must be earlier or not as a walk has them.
_WALK_SHARES = (0.125, 0.5, 0.875)

# Whether keys ys of a part, numbered in the order of its walk, are summed before the tile of key x, of a
# larger logit, is looked at.
Earlier = Callable[[AskedPart, int, list[int]], list[bool]]


class TilesSeen(NamedTuple):
    """What was seen of tiles."""

    keys: int | None  # over which the maximum is taken
    order: str | None  # in which a part's are walked: forward or backward; None: it cannot be told
    how: str  # the probe that showed them, or that would have


def tiles_by_overflow(ask: Asking, part: tuple[int, int], weights: Weights) -> TilesSeen:
    """Tiles of sums that overflow: part is its bounds."""
    burst = int(65504 / (61440 * math.exp(-(weights.offset or 0.0)))) + 1

    def earlier(where: AskedPart, x: int, ys: list[int]) -> list[bool]:
        """Whether keys up to y overflow. False below the first few."""
        logits = ask.level(list(range(*part)))
        logits[0, where.key(x)] = _BEYOND_LAGS
        values = columns([{where.key(y - i): 61440.0 for i in range(burst) if y >= i} for y in ys])
        return (~torch.isfinite(ask.weigh(logits, values)[0])).tolist()

    keys = part[1] - part[0]
    if keys - 1 <= burst:
        return TilesSeen(None, None, NO_EDGE)
    both = [AskedPart(*part, newest_first) for newest_first in (False, True)]
    # More than one burst: the first may lie in two tiles, or in a part's last one, cut short.
    first = [i * burst for i in range(1, 5) if i == 1 or i * burst < keys // 2]
    apart = [any(earlier(where, keys - 1, first)) for where in both]
    return _tiles(ask, both, apart, earlier, burst, "overflow")


def tiles_by_rounding(ask: Asking, part: tuple[int, int], weights: Weights) -> TilesSeen:
    """Tiles of P that is rounded and was not divided by l: part is its bounds."""
    pair = _telling_pair(ask, AskedPart(*part, weights.newest_first), weights)

    def earlier(where: AskedPart, x: int, ys: list[int]) -> list[bool]:
        top, small = where.key(x), [where.key(y) for y in ys]
        logits = ask.level([top])
        logits[0, small] = -pair.g
        found = ask.weigh(logits, columns([{y: pair.v_a, top: pair.v_b} for y in small]))[0]
        return pair.unrounded(found, len(ys))

    both = [AskedPart(*part, newest_first) for newest_first in (False, True)]
    first, last = part[0], part[1] - 1
    pairs = columns([{first: pair.v_a, last: pair.v_b}, {last: pair.v_a, first: pair.v_b}])
    logits = torch.cat([ask.level([top]) for top in (last, first)])
    logits[0, first] = logits[1, last] = -pair.g
    apart = pair.unrounded(ask.weigh(logits, pairs).diagonal(), 1)
    return _tiles(ask, both, apart, earlier, 1, "rounding of P")


def _tiles(
    ask: Asking, both: list[AskedPart], apart: list[bool], test: Earlier, spare: int, how: str
) -> TilesSeen:
    """both: the part walked forward and backward; apart: whether its ends are, either way."""
    if not any(apart):
        return TilesSeen(None, None, NO_EDGE)
    order = None if all(apart) else "forward" if apart[0] else "backward"
    where = both[order == "backward"]
    keys, start = _size(ask, where, test, spare)
    if order is not None and not _is_walk(ask, where, test, spare, keys, start):
        return TilesSeen(None, None, _NO_WALK)
    return TilesSeen(keys, order, how if keys is not None else _UNEVEN)


def _is_walk(ask: Asking, where: AskedPart, test: Earlier, spare: int, tile: int | None, start: int) -> bool:
    """Whether keys from all over the part are earlier than some as they are where it is walked in this order,
    by tiles of so many keys one of which begins at `start`; tile: None where that is not known."""
    keys = where.end - where.first
    count = min(keys - spare, ask.regime.columns)
    for x in (int(share * keys) for share in _WALK_SHARES):
        ys = sorted({spare + (keys - spare) * i // count for i in range(count)} - {x})
        seen = test(where, x, ys)
        if tile is not None and seen != [(y - start) // tile < (x - start) // tile for y in ys]:
            return False
        # Tiles of whatever size: those of the keys that come first.
        if sorted(seen, reverse=True) != seen:
            return False
    return True


def _size(ask: Asking, where: AskedPart, test: Earlier, spare: int) -> tuple[int | None, int]:
    """Keys of a tile: the distance of two of its edges, each found by halving the way back from a later key;
    and where one begins, counted as `where` is walked.

    spare: first keys of which the test cannot tell. None where no two edges are as far apart as two others.
    """
    keys = where.end - where.first
    x, low, starts = min(keys - 1, PROBED_KEYS), spare, []
    if where.newest_first:
        # Tiles are counted from the part's first key, which is looked at last.
        x, low, starts = keys - 1, max(spare, keys - 1 - PROBED_KEYS), [keys]
    while len(starts) < 3 and x > low:
        start = _start_of(ask, where, low, x, test)
        if start is None:
            # It is the tile that is looked at first: backward it may be cut short, as the part's last one.
            starts += [0] if starts and not where.newest_first else []
            break
        starts.append(start)
        x = start - 1
    if len(starts) < 2:
        return None, 0
    # The first of them may have been looked for from within a tile.
    sizes = {a - b for a, b in itertools.pairwise(starts)}
    return sizes.pop() if len(sizes) == 1 else None, starts[0]


def _start_of(ask: Asking, where: AskedPart, low0: int, x: int, test: Earlier) -> int | None:
    """The first key of the tile that key x lies in, unless key low0 does too."""
    low, high = low0 - 1, x
    while high - low > 1:
        count = min(high - low - 1, ask.regime.columns)
        # The first time from low0 on, and that one itself.
        ys = sorted({low + 1 + (high - low - 1) * i // count for i in range(count)})
        is_earlier = test(where, x, ys)
        low = max([low, *(y for y, e in zip(ys, is_earlier, strict=True) if e)])
        if low < low0:
            return None
        high = min([high, *(y for y, e in zip(ys, is_earlier, strict=True) if not e and y > low)])
    return high if low0 < x else None


class _Pair(NamedTuple):
    """Two keys g apart: the values that cancel, and what their P is off by, relative, where the smaller one
    is rounded and where it is not."""

    g: float
    v_a: float
    v_b: float
    if_rounded: float
    if_not: float

    def unrounded(self, results: torch.Tensor, small: int) -> list[bool]:
        """Of the result of each column with one such pair, of so many smaller keys: whether P of its smaller
        key was not rounded relative to the larger one."""
        a = self.v_a * math.exp(-self.g)
        off = (results * (1 + small * math.exp(-self.g)) - (a + self.v_b)) / a
        found: list[bool] = ((off - self.if_not).abs() < abs(self.if_rounded - self.if_not) / 2).tolist()
        return found


def _telling_pair(ask: Asking, part: AskedPart, weights: Weights) -> _Pair:
    """Of many g, one whose P is rounded far, as keys show that come after the larger one. Not as far as can
    be: there an exponential that is 1e-4 off, as that of another loop may be, would turn it."""
    # Farther apart than a maximum that lags behind may lie, as far as P is not subnormal.
    most = min(_NORMAL.get(weights.p or "", 9.7) - (weights.offset or 0.0), 9.7)
    gaps = torch.round((most - 0.1 - torch.arange(48, dtype=torch.float64) / 16) * 16) / 16
    gaps = gaps[gaps >= 0.25]
    seen = ratios(ask, part, gaps) * torch.exp(gaps) - 1
    smooth = torch.expm1(-gaps * weights.slope)
    p = torch.exp(-gaps - (weights.offset or 0.0))
    bits = {"bf16": 8, "e4m3": 4, "e5m2": 3}.get(weights.p or "", 11)
    # In steps of P: a half is a tie.
    steps = (seen - smooth).abs() * p * torch.exp2(bits - torch.frexp(p).exponent.double())
    best = torch.where((steps % 1 > 0.2) & (steps % 1 < 0.4), (seen - smooth).abs(), 0.0).argmax()
    v_a, v_b = cancelling(torch.exp(-gaps[best : best + 1]), 11 if ask.regime.dtype != torch.bfloat16 else 8)
    return _Pair(float(gaps[best]), float(v_a), float(v_b), float(seen[best]), float(smooth[best]))
