"""Rules about a pair of arms: which windows are compared, what a distance is to, what a changed plan is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from verify.kernels.trace import LaunchTrace
from verify.ppl.evidence.pairs import (
    both,
    changed_plan,
    difference_of,
    distance_between,
    only_reference_exact,
)
from verify.ppl.evidence.scores import Scores
from verify.ppl.groups import TOKEN_SCHEMA, GroupResult

SCORED = 4


def scores(**arms: dict[int, list[float]]) -> Scores:
    """By arm and window: KLD to exact of each scored position; the nll is ten times it."""
    rows: list[dict[str, Any]] = []
    for arm, windows in arms.items():
        for window, klds in windows.items():
            for i, kld in enumerate(klds):
                values = dict.fromkeys(TOKEN_SCHEMA.names, 0)
                rows.append(
                    values
                    | {"arm": arm, "window": window, "position": i, "kld_to_exact": kld, "nll": 10 * kld}
                )
    tokens = pa.Table.from_pylist(rows, schema=TOKEN_SCHEMA)
    empty = TOKEN_SCHEMA.empty_table()
    return Scores(GroupResult(tokens=tokens, layers=empty, top1=empty, findings={}, traces={}), SCORED)


def test_windows_that_both_ran_are_compared() -> None:
    some = scores(a={0: [1.0] * 4, 2: [3.0] * 4}, b={2: [5.0] * 4, 3: [7.0] * 4})
    mine, theirs = both(some, "a", "b", "kld_to_exact")
    assert (mine.tolist(), theirs.tolist()) == ([[3.0] * 4], [[5.0] * 4])
    assert difference_of(some, "a", "b").mean == pytest.approx(-20)
    assert math.isnan(difference_of(some, "a", "nobody").mean)


def test_a_window_that_an_arm_did_not_finish_is_left_out() -> None:
    some = scores(a={0: [1.0] * 4, 1: [1.0] * 2})
    assert some.column("a", "nll").shape == (1, SCORED)


def test_a_distance_is_a_ratio_of_divergences() -> None:
    some = scores(a={w: [4e-8] * 4 for w in range(8)}, b={w: [1e-8] * 4 for w in range(8)})
    found = distance_between("a", "b", None, some)
    assert found is not None
    # A divergence is quadratic in the error.
    assert found.ratio == pytest.approx(2)


def test_what_is_not_finite_has_no_distance() -> None:
    some = scores(a={0: [math.nan] * 4}, b={0: [1e-8] * 4})
    assert distance_between("a", "b", None, some) is None
    assert distance_between("nobody", "b", None, some) is None


def test_the_floor_stands_in_for_a_reference_that_is_exact() -> None:
    some = scores(a={0: [4e-8] * 4}, exact={0: [0.0] * 4}, floor={0: [1e-8] * 4})
    found = distance_between("a", "exact", "floor", some)
    assert found is not None
    assert found.ratio == pytest.approx(2)
    assert only_reference_exact(np.array([1e-9, 0]), np.zeros(2))
    assert not only_reference_exact(np.zeros(2), np.zeros(2))
    assert not only_reference_exact(np.ones(2), np.ones(2))


def test_a_changed_plan_is_what_the_traces_differ_in() -> None:
    def trace(*rows: tuple[int, int, int]) -> LaunchTrace:
        """Rows of (n_kv, KV parts, how many)."""
        lines = []
        for n_kv, parts, count in rows:
            cuts = [n_kv * i // parts for i in range(parts + 1)]
            lines.append(["decode", n_kv, "k", "", [2], cuts, "one", True, count])
        return LaunchTrace.from_json(lines)

    found = changed_plan(
        trace((10, 1, 3), (11, 2, 1), (12, 2, 4)), trace((10, 1, 3), (11, 1, 1)), range(9, 13)
    )
    # n_kv 9 was not run at all; 12 only by the candidate.
    assert found.n_kv == {11, 12}
    assert found.tokens == 2 / 4
    assert found.rows == 5 / 8
