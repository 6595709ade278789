"""From readings to the arithmetic of a call: what its budget, expected size and gain limit follow from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from verify.kernels.budget.arithmetic import Arithmetic, loosest
from verify.kernels.call import Call
from verify.kernels.identify.reading import Reading
from verify.kernels.identify.tiles import NO_EDGE
from verify.kernels.lengths import lengths_of
from verify.kernels.numbers import FLOAT_TYPES, MMA_KEYS, U_F32, U_F32_TENSOR_CORE, type_of

# An exponential that is farther off than this has roundings that no budget charges.
_EXPONENTIAL = 1e-6
# Keys of a part's last tile of which no probe can tell that they are not the one before it.
_UNSEEN_KEYS = 2
# The shortest rows that are read.
_FEW = 64


class Order(NamedTuple):
    """How a row is summed.

    parts: that are merged; share: of its keys that the longest of them has; tile: keys a tile, or a product
    where no tile was seen, None where neither was; sums: the share of the longest part that one accumulator
    takes; whole_tile: `tile` is a tile.
    """

    parts: int
    share: float
    tile: int | None
    sums: float = 1.0
    whole_tile: bool = True

    def cuts(self, n_kv: int) -> tuple[int, ...]:
        """Bounds of so many parts, the longest first: depths follow from them, places do not."""
        parts = max(min(self.parts, n_kv), 1)
        longest = min(math.ceil(self.share * n_kv) + (self.tile or 0), n_kv) if parts > 1 else n_kv
        longest = min(longest, n_kv - parts + 1)
        rest = n_kv - longest
        return tuple(sorted({0, longest, *(longest + rest * i // (parts - 1) for i in range(1, parts))}))


def order_of(reading: Reading) -> Order:
    longest = max(b - a for a, b in pairwise(reading.cuts))
    tile, whole_tile = reading.tile, True
    if tile is None and reading.mma_block is not None and reading.accumulator == "f32":
        # A product is added after one rescale at most: sums are no deeper than those of tiles of its keys.
        tile, whole_tile = reading.mma_block, False
    elif tile is None and reading.how.get("tile") == NO_EDGE:
        # It was looked for where it would have shown: a tile holds a whole part.
        tile = longest
    elif tile is None:
        tile, whole_tile = reading.mma_block, False
    parts, sums = reading.parts, 1.0
    if reading.sum_keys:
        # Each sum is merged as a part is; the fewest keys of one make the most of them.
        parts = max(parts, math.ceil(reading.n_kv / min(reading.sum_keys)))
        sums = min(max(reading.sum_keys) / longest, 1.0)
    return Order(parts=parts, share=longest / reading.n_kv, tile=tile, sums=sums, whole_tile=whole_tile)


def arithmetic_of(readings: Sequence[Reading], input_type: str) -> Arithmetic | None:
    """The loosest of what was read at lengths of one regime; None where they do not agree, or where budgets
    do not know their types.

    Rounding of logits to 16 bits is no arithmetic that a budget allows for: a kernel that has it is coarser
    than what it returns, and is told so.
    """
    first = readings[0]
    if any((each.weights, each.result) != (first.weights, first.result) for each in readings):
        return None
    sums = {each.accumulator for each in readings}
    p, result = first.p, first.result
    # A row of one tile shows less of them.
    accumulator = "f16" if sums == {"f32", "f16"} else first.accumulator if len(sums) == 1 else None
    if p not in FLOAT_TYPES or result not in FLOAT_TYPES or accumulator not in ("f32", "f16"):
        return None
    if any(each.offset is None and not each.p_normalised and p != "f32" for each in readings):
        return None
    if first.p_truncated or any(each.p_flushed or each.first_product != input_type for each in readings):
        return None
    loose = loosest(input_type)
    orders = [order_of(each) for each in readings]
    tiles = [order.tile for order in orders]
    tile = None if None in tiles else max(t for t in tiles if t is not None)
    # A part that ends a key or two behind a tile of longer rows' looks like one tile.
    seen = max((each.tile or 0 for each in readings), default=0)
    if tile is not None and seen < tile <= seen + _UNSEEN_KEYS:
        tile = seen
    order = Order(
        max(o.parts for o in orders), max(o.share for o in orders), tile, max(o.sums for o in orders)
    )
    walks = {each.tile_order for each in readings}
    steps = [each.sum_step for each in readings if each.accumulator != "f32"]
    truncates = any(each.rounding == "truncated" or (each.accumulator_bits or 24) < 24 for each in readings)
    offset = max(
        math.log(each.n_kv) if each.p_normalised else max(each.offset or 0.0, 0.0) for each in readings
    )
    off = max(each.exponential or 0.0 for each in readings)
    parts_in = {each.parts_in for each in readings}
    q_types = {each.q_scaled_in for each in readings}
    u_q = 0.0 if q_types == {"f32"} else max(FLOAT_TYPES[q or input_type].u for q in q_types)
    # Products of tensor cores are not seen one by one.
    wide = accumulator == "f32" and truncates
    return replace(
        loose,
        p=p,
        out=result,
        acc=accumulator,
        u=U_F32_TENSOR_CORE if wide else U_F32,
        u_q=u_q,
        u_part=0.0 if parts_in == {"f32"} else max(FLOAT_TYPES[t or input_type].u for t in parts_in),
        block=tile,
        l_in_tiles=all(o.whole_tile for o in orders),
        tile_order=walks.pop() if len(walks) == 1 else None,
        cuts_at=order.cuts if tile is not None else None,
        # Where it cannot be told each key is a step.
        sum_step=min((step or 1 for step in steps), default=MMA_KEYS),
        sum_share=order.sums,
        l_from_rounded_p=any(each.l_of_rounded_p is not False for each in readings) and p != "f32",
        p_shift=offset,
        # As large as it was seen where it was looked at; elsewhere twice that, or all of a cubic's.
        u_exp=max(2 * off, loose.u_exp) if off >= _EXPONENTIAL else 0.0,
        stale_maximum=any(bool(each.rescale) for each in readings),
        stated=all(each.exponential < _EXPONENTIAL for each in readings),
        identified=True,
    )


def coarser(readings: Sequence[Reading]) -> list[str]:
    """What rounds more than a kernel's result and P let expect, in sentences: no budget allows for it."""
    said: dict[str, str] = {}
    for each in sorted(readings, key=lambda r: (r.n_q, r.n_kv)):
        if each.logits in ("f16", "bf16"):
            word = {"f16": "float16", "bf16": "bfloat16"}[each.logits]
            said.setdefault(
                each.logits,
                f"logits are rounded to {word} (seen at {each.n_kv} keys): their error grows with their size",
            )
    return list(said.values())


class KnownReadings(NamedTuple):
    """What was read off a kernel, at some lengths, for calls without options."""

    readings: tuple[Reading, ...]

    def at(self, call: Call) -> Arithmetic | None:
        """The arithmetic of a call; None for one that nothing was read of."""
        return loosest_of([self], call)

    def around(self, call: Call) -> tuple[Reading, ...]:
        """The readings by whose lengths a call is judged; none where its lengths were not read."""
        options = (call.sliding_window, call.softcap, call.sinks, call.alibi_slopes)
        if any(option is not None for option in options) or not call.kv_len.numel():
            return ()
        lengths = lengths_of(call.kv_len)
        # Rows of a call that are much shorter may be another regime's.
        least, most = lengths.least, lengths.greatest
        known = sorted(self.readings, key=lambda each: each.n_kv)
        if not known or most > known[-1].n_kv:
            return ()
        # What few keys do alone, fewer do as well.
        if 2 * least < known[0].n_kv and known[0].n_kv > _FEW:
            return ()
        above = next(i for i, each in enumerate(known) if each.n_kv >= most)
        below = max((i for i, each in enumerate(known) if each.n_kv <= least), default=0)
        if 2 * least >= most:
            # Rows of nearly the same length are the longest one's.
            exact = known[above].n_kv == most
            below = above if exact else max(above - 1, 0)
        return tuple(known[below : above + 1])


def loosest_of(known: Sequence[KnownReadings], call: Call) -> Arithmetic | None:
    """The arithmetic of a call to which each of these may apply, as those of fewer and of more tokens do.

    None where one of them says nothing of it, or where they do not agree.
    """
    readings = [each.around(call) for each in known]
    kind = type_of(call.q.dtype)
    if kind is None or not all(readings):
        return None
    return arithmetic_of([one for each in readings for one in each], kind.name)
