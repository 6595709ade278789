"""What the rows of layers.parquet amount to: figures over a run, and which of several faults is said."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from verify.arms.kernel_errors import faults_in_place, in_place_record, kernel_errors, rows_of
from verify.arms.own_error import LAYER_SCHEMA, HeadErrors


def rows(count: int = 8, **change: Any) -> list[HeadErrors]:
    """A right kernel's rows, a head and layer each; `change`: of all of them."""
    values: dict[str, Any] = {
        "window": 0,
        "arm": "candidate",
        "path": "decode",
        "relative_rms": 1e-4,
        "gain": 0.0,
        "max_budget_ratio": 0.5,
        "rms_ratio": 0.9,
        "relative_max": 0.0,
        "vacuous": 0.0,
        "gain_bias": 0.0,
        "gain_falls": 0.0,
        "gain_rises": 0.0,
        "nonfinite": 0,
        "position": 7,
    }
    return [HeadErrors(**{**values, "layer": i // 2, "head": i % 2, **change}) for i in range(count)]


def table(*errors: HeadErrors) -> pa.Table:
    return pa.Table.from_pylist([one._asdict() for one in errors], schema=LAYER_SCHEMA)


def test_a_right_kernel_has_no_fault() -> None:
    layers = table(*rows())
    assert faults_in_place(layers, "candidate", "it") == []
    assert faults_in_place(layers, "nobody", "it") == []
    record = in_place_record(layers, "candidate")
    assert record is not None
    assert (record.checks, record.max_budget_ratio) == (8, 0.5)
    assert [line.layer for line in record.layers] == [0, 1, 2, 3]
    assert in_place_record(layers, "nobody") is None


def test_rows_without_a_budget_count_where_they_have_figures() -> None:
    unsampled = rows(
        4,
        max_budget_ratio=math.nan,
        rms_ratio=math.nan,
        vacuous=math.nan,
        gain_falls=math.nan,
        gain_rises=math.nan,
    )
    found = kernel_errors(rows_of(table(*rows(4), *unsampled), "candidate"))
    assert found is not None
    assert (found.checks, found.max_budget_ratio, found.vacuous) == (8, 0.5, 0.0)
    assert found.rms_ratio == pytest.approx(0.9)


def test_nan_is_graver_than_any_breach() -> None:
    layers = table(*rows(6), *rows(1, max_budget_ratio=9.0), *rows(1, nonfinite=2, layer=3, head=1))
    (fault,) = faults_in_place(layers, "candidate", "it")
    assert fault.startswith("it: NaN or Inf at window 1, layer 3, position 7, head 1")
    assert "(2 of 8 checks of a layer and head failed)" in fault


def test_the_largest_breach_is_said() -> None:
    layers = table(*rows(6), *rows(1, max_budget_ratio=2.0), *rows(1, max_budget_ratio=3.0, layer=1))
    (fault,) = faults_in_place(layers, "candidate", "it")
    assert "3 times its rounding budget at window 1, layer 1" in fault


def test_a_gain_that_all_share_is_a_fault_that_no_element_shows() -> None:
    (fault,) = faults_in_place(table(*rows(gain=1e-4)), "candidate", "it")
    assert "off by a common factor of 1 +0.0001" in fault
    # What truncation explains is none.
    assert faults_in_place(table(*rows(gain=1e-4, gain_rises=2e-4)), "candidate", "it") == []


def test_few_checks_say_nothing_about_a_gain() -> None:
    found = kernel_errors(table(*rows(3, gain=1e-4)))
    assert found is not None
    assert math.isinf(found.gain_se) and math.isinf(found.gain_limit)


def test_errors_larger_than_expected_are_a_fault() -> None:
    (fault,) = faults_in_place(table(*rows(64, rms_ratio=3.0)), "candidate", "it")
    assert "times their expected size" in fault


def test_a_head_that_stands_apart_in_all_layers_is_named() -> None:
    """Within what roundings may make of a gain; one layer, or every head, is another matter."""
    numbers = random.Random(0)
    drawn = {(w, l, h): numbers.gauss(0, 1e-5) for w in range(2) for l in range(12) for h in range(9)}

    def faults(off: Callable[[int, int], float]) -> list[str]:
        found = [
            rows(1, window=w, layer=l, head=h, gain=gain + off(l, h), gain_rises=1e-2, gain_falls=1e-2)[0]
            for (w, l, h), gain in drawn.items()
        ]
        return faults_in_place(table(*found), "candidate", "it")

    (fault,) = faults(lambda layer, head: 1e-3 * (head == 7))
    assert fault.startswith("it: head 7 is off by a common factor of 1 +0.001 that no other head has")
    assert fault.endswith(", over all layers, on the exact arm's own q, k and v")
    for right in (
        lambda layer, head: 0.0,
        lambda layer, head: 1e-3,
        lambda layer, head: 1e-2 * (head == 7 and layer == 3),
        lambda layer, head: 1e-3 * (head % 3 == 0),
    ):
        assert faults(right) == []
