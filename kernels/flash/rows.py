"""Which plan each row of a `flash` call follows, and so which rows are launched together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from verify.kernels.plans.asked import RowAsked
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
    asked: RowAsked,
    lengths: tuple[int, ...],
    rows: int,
    tokens_a_tile: int,
    tiles: tuple[tuple[int, int], ...] = (),
) -> RowPlans:
    """Kept for a few calls: the layers of a model ask for the same rows again.

    asked: of each row but its keys; lengths [B * T]: these; rows: T. A prefill tile of tokens_a_tile rows
    follows the plan of its longest row; tiles: of packed tokens the first row of each and how many it has.
    Raises ValueError where head groups do not sum to r.
    """
    at = {n: plan.at(asked.of_keys(n)) for n in set(lengths)}
    planned = list(lengths)
    if asked.prefill:
        if not tiles:
            tiles = tuple(
                (t, min(tokens_a_tile, first + rows - t))
                for first in range(0, len(planned), rows or 1)
                for t in range(first, first + rows, tokens_a_tile)
            )
        for t, count in tiles:
            tile = slice(t, t + count)
            planned[tile] = [max(planned[tile])] * count
    plans = tuple(at[n] for n in planned)
    chosen = sorted({(p.head_groups, p.launch) for p in plans})
    if not chosen and plan.policy is None:
        plan.groups(asked.ratio)
    # Rows of a prefill tile cannot be told apart: no policy chooses head groups by the length there.
    assert not asked.prefill or len(chosen) <= 1, chosen
    number = {kind: i for i, kind in enumerate(chosen)}
    kind_of_row = tuple(number[p.head_groups, p.launch] for p in plans)
    slots = [1] * len(chosen)
    for p, i in zip(plans, kind_of_row, strict=True):
        slots[i] = max(slots[i], len(p.cuts) - 1)
    kinds = tuple(Kind(groups, launch, slots[i]) for i, (groups, launch) in enumerate(chosen))
    return RowPlans(plans, kinds, kind_of_row, Counter(zip(lengths, plans, kind_of_row, strict=True)))
