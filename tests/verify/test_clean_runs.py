"""`verify diff` on right kernels of known distance: none broken, none as near as its peer degraded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/clean_runs.py"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_right_kernels_are_neither_broken_nor_degraded(tmp_path: Path) -> None:
    """`benchmarks/clean_runs.py` makes a thousand of these."""
    out = tmp_path / "runs.json"
    command = [
        sys.executable,
        str(SCRIPT),
        "--runs",
        "150",
        "--seconds",
        "240",
        "--seed",
        "7",
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=3500)
    found = json.loads(out.read_text())
    clean, above = found["counts"]["clean"], found["counts"]["above"]
    assert found["wrong"] == []
    assert sum(clean.values()) >= 10
    assert clean.get("inconclusive", 0) <= 0.5 * sum(clean.values())
    assert above.get("degraded", 0) >= 0.5 * sum(above.values())
