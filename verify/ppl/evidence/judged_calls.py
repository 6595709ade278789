"""How many calls of a kernel were held against exact, and what that says about a fault in few of them."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.compute as pc

from verify.ppl.groups import GroupResult

# A rate of bad calls is named at this confidence.
CONFIDENCE = 0.95


def judged_calls(result: GroupResult, arm: str, *, calls_of_window: int = 1, sequences: int = 1) -> int:
    """Calls of an arm that were held against exact: layers and windows whose budgets were derived, each in so
    many calls, of so many sequences each."""
    rows = result.layers.filter(pc.equal(result.layers["arm"], arm))
    judged = ~np.isnan(rows["max_budget_ratio"].to_numpy())
    windows, layers = (rows[name].to_numpy()[judged] for name in ("window", "layer"))
    together = len(set(zip(windows.tolist(), layers.tolist(), strict=True)))
    return together * calls_of_window // sequences


def missed(calls: int, rate: float) -> float:
    """Chance that a fault in this share of calls, at random, was in none of so many."""
    return (1 - rate) ** calls


def steady_sentence(calls: int) -> str:
    """What so many calls say about a fault in few of them."""
    if not calls:
        return "no call was held against exact"
    least = 1 - (1 - CONFIDENCE) ** (1 / calls)
    return (
        f"{calls} calls were held against exact: a fault in 1 call of {max(math.floor(1 / least), 1)} or more"
        f" would have been met ({CONFIDENCE:.0%}), one in 1 of 50 with {1 - missed(calls, 1 / 50):.0%}"
    )
