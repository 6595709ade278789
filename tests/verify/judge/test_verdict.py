from __future__ import annotations

import pytest

from verify.judge.statistics import DistanceRatio
from verify.judge.verdict import EXIT_CODES, GRAVITY, Decision, PairEvidence, decide, overall


def ratio(low: float, high: float) -> DistanceRatio:
    return DistanceRatio((low * high) ** 0.5, low, high, 1.1, "this text only")


def evidence(**changes: object) -> PairEvidence:
    given: dict[str, object] = {
        "faults": [],
        "same_spec": False,
        "coverage": 1.0,
        "bitwise_equal": False,
        "distance": ratio(0.95, 1.05),
    }
    return PairEvidence(**(given | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "round-off"),
        ({"faults": ["NaN"]}, "broken"),
        ({"faults": ["NaN"], "coverage": 0.0}, "broken"),
        ({"coverage": 0.0}, "inconclusive"),
        ({"coverage": 0.0, "bitwise_equal": True}, "inconclusive"),
        ({"coverage": 0.0, "same_spec": True, "bitwise_equal": True}, "inconclusive"),
        ({"coverage": 0.0, "same_spec": True, "bitwise_equal": True, "allow_same": True}, "identical"),
        ({"same_spec": True}, "inconclusive"),
        ({"same_spec": True, "faults": ["NaN"]}, "broken"),
        ({"bitwise_equal": True}, "identical"),
        ({"coverage": 0.2, "min_coverage": 0.5}, "inconclusive"),
        ({"coverage": 0.6, "min_coverage": 0.5}, "round-off"),
        ({"distance": ratio(1.11, 1.2)}, "round-off"),
        ({"distance": ratio(1.26, 1.4)}, "degraded"),
        ({"distance": ratio(1.26, 1.4), "margin": 1.5}, "round-off"),
        ({"distance": ratio(6, 8), "margin": 1000.0}, "round-off"),
        ({"distance": ratio(1.06, 1.2), "margin": 1.05}, "degraded"),
        ({"distance": ratio(0.5, 0.94), "margin": 1.05}, "improved"),
        ({"distance": ratio(1.05, 1.2)}, "round-off"),
        ({"distance": ratio(1.05, 1.3)}, "inconclusive"),
        ({"distance": ratio(1.05, 1.3), "margin": 1.5}, "round-off"),
        ({"distance": ratio(0.5, 0.9)}, "improved"),
        ({"distance": ratio(0.5, 0.95)}, "round-off"),
        ({"distance": None}, "inconclusive"),
    ],
)
def test_the_first_rule_that_applies_decides(changes: dict[str, object], verdict: str) -> None:
    decision = decide(evidence(**changes))
    assert decision.verdict == verdict
    assert decision.reasons


def test_a_run_has_the_gravest_verdict_of_its_pairs() -> None:
    decisions = [Decision("round-off", []), Decision("degraded", []), Decision("identical", [])]
    assert overall(decisions) == "degraded"
    assert overall([*decisions, Decision("broken", [])]) == "broken"
    assert overall([decisions[0], decisions[2], Decision("inconclusive", [])]) == "inconclusive"


def test_one_pair_that_passes_hides_no_other_that_does_not() -> None:
    assert sorted(GRAVITY) == sorted(EXIT_CODES)
    failing = [verdict for verdict in GRAVITY if EXIT_CODES[verdict] != 0]
    assert list(GRAVITY[: len(failing)]) == failing


def test_exit_codes_are_those_of_the_design() -> None:
    assert {v: EXIT_CODES[v] for v in GRAVITY} == {
        "broken": 1,
        "inconclusive": 3,
        "identical": 0,
        "degraded": 1,
        "improved": 0,
        "round-off": 0,
    }
