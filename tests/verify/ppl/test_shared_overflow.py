"""NaN and Inf where the baseline has it too are not this change, in ppl and gen as in diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.cli import verify
from support.ppl_runs import Tiny, run

KERNELS = Path(__file__).parents[2] / "support/user_kernels.py"
FEW, MORE = (f"py:{KERNELS}::{name},acc=f32" for name in ("infinite_at_12", "infinite_at_12_and_14"))


def gen(tiny: Tiny, out: Path, *specs: str) -> dict[str, Any]:
    verify(
        "gen", "-m", str(tiny.model), "-p", "a b c d e f g h i j k l m n o p", "-n", "3", "--ignore-eos",
        "--device", "cpu", "--out", str(out), *specs,
    )  # fmt: skip
    report: dict[str, Any] = json.loads((out / "run.json").read_text())
    return report


@pytest.mark.parametrize("command", [run, pytest.param(gen, marks=pytest.mark.slow)])
def test_a_subset_of_what_the_baseline_overflows_in_is_not_the_candidates(
    command: Any, tiny: Tiny, tmp_path: Path
) -> None:
    def report_of(baseline: str, candidate: str) -> dict[str, Any]:
        folder = tmp_path / ("few" if candidate == FEW else "more")
        found = command(tiny, folder, "--baseline", baseline, "--candidate", candidate)
        report: dict[str, Any] = found[1] if isinstance(found, tuple) else found
        return report

    report = report_of(MORE, FEW)
    assert report["verdict"] == "inconclusive", report["reasons"]
    assert any("the baseline too: not this change" in reason for reason in report["reasons"])
    # The other way round it is.
    report = report_of(FEW, MORE)
    assert report["verdict"] == "broken" and "NaN or Inf" in report["reasons"][0]
