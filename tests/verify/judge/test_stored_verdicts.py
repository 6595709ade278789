"""Verdicts that pages show, from the figures that lie beside them: today's rules say the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from verify.judge.statistics import DistanceRatio
from verify.judge.verdict import PairEvidence, decide

RESULTS = Path(__file__).parents[3] / "benchmarks/results"


@pytest.mark.parametrize("name", ["generation", "distances", "noise-arms"])
def test_verdicts_of_pages_are_those_of_today(name: str) -> None:
    """docs/generation.md, docs/evidence.md and docs/noise.md: kernels of ours, judged by their distance."""
    runs = json.loads((RESULTS / f"{name}.json").read_text())
    pairs = [pair for run in (runs if isinstance(runs, list) else [runs]) for pair in run["pairs"]]
    assert len(pairs) >= 4
    for pair in pairs:
        low, high = pair["distance_ratio_ci"]
        high = math.inf if high is None else high
        now = decide(
            PairEvidence(
                faults=[],
                same_spec=False,
                coverage=pair["coverage"],
                bitwise_equal=pair["bitwise_equal"],
                distance=DistanceRatio(pair["distance_ratio"], low, high, math.nan, ""),
            )
        )
        assert now.verdict == pair["verdict"], (pair["candidate"], now.reasons)
