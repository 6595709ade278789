"""Which plan each row of a `flash` call follows, and so which rows are launched together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from verify.kernels.call import Shape
from verify.kernels.eager import plan_of_row
from verify.kernels.plans.plan import Plan, RowPlan
from verify.kernels.plans.policy import Launch


class Kind(NamedTuple):
    """Rows that one set of launches computes: their head groups, and the most parts that one of them has."""

    head_groups: tuple[int, ...]
    launch: Launch
    slots: int


@dataclass(frozen=True, eq=False)
class RowPlans:
    """plans and kind_of_row [B * T]: the plan of each row, and which of `kinds` it belongs to.

    counts: how many rows have this n_kv, plan and kind.
    """

    plans: tuple[RowPlan, ...]
    kinds: tuple[Kind, ...]
    kind_of_row: tuple[int, ...]
    counts: Mapping[tuple[int, RowPlan, int], int]


@lru_cache(maxsize=16)
def plans_of_rows(
    plan: Plan,
    shape: Shape,
    lengths: tuple[int, ...],
    tokens_a_tile: int,
    decode: bool,
    *,
    cache_type: str,
    sinks: bool,
    sliding_window: bool,
) -> RowPlans:
    """Kept for a few calls: the layers of a model ask for the same rows again.

    lengths [B * T]: visible keys of each row. A prefill tile of tokens_a_tile rows follows the plan of its
    longest row. Raises ValueError where head groups do not sum to r.
    """
    at = {
        n: plan_of_row(
            plan, shape, n, decode, cache_type=cache_type, sinks=sinks, sliding_window=sliding_window
        )
        for n in set(lengths)
    }
    planned = list(lengths)
    if not decode:
        for first in range(0, len(planned), shape.rows or 1):
            end = first + shape.rows
            for t in range(first, end, tokens_a_tile):
                tile = slice(t, min(t + tokens_a_tile, end))
                planned[tile] = [max(planned[tile])] * len(planned[tile])
    plans = tuple(at[n] for n in planned)
    chosen = sorted({(p.head_groups, p.launch) for p in plans})
    if not chosen and plan.policy is None:
        plan.groups(shape.ratio)
    # Rows of a prefill tile cannot be told apart: no policy chooses head groups by the length there.
    assert decode or len(chosen) <= 1, chosen
    number = {kind: i for i, kind in enumerate(chosen)}
    kind_of_row = tuple(number[p.head_groups, p.launch] for p in plans)
    slots = [1] * len(chosen)
    for p, i in zip(plans, kind_of_row, strict=True):
        slots[i] = max(slots[i], len(p.cuts) - 1)
    kinds = tuple(Kind(groups, launch, slots[i]) for i, (groups, launch) in enumerate(chosen))
    return RowPlans(plans, kinds, kind_of_row, Counter(zip(lengths, plans, kind_of_row, strict=True)))
