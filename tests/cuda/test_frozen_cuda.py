"""Frozen casts, noise arms, planted faults and the end of a window, on a GPU with our CUDA kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from support.cli import verify
from support.ppl_runs import Tiny, write_tiny

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def tiny_gpu(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def run(tiny: Tiny, out: Path, *more: str) -> dict[str, Any]:
    base = ["ppl", "-m", str(tiny.model), "-f", str(tiny.text), "-c", "64", "--chunks", "6"]
    done = verify(*base, "--device", "cuda", "--out", str(out), *more)
    assert (out / "run.json").is_file(), done.stderr
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


def test_a_pass_without_error_is_exact_to_the_bit(tiny_gpu: Tiny, tmp_path: Path) -> None:
    run(tiny_gpu, tmp_path / "run", "--baseline", "exact", "--candidate", "flash")
    tokens = pq.read_table(tmp_path / "run/tokens.parquet")
    exact, frozen = (tokens.filter(pc.equal(tokens["arm"], name)) for name in ("exact", "baseline/frozen"))
    assert set(frozen["kld_to_exact"].to_pylist()) == {0.0}
    assert frozen["nll"].equals(exact["nll"])


def test_noise_and_power_with_the_cuda_kernel(tiny_gpu: Tiny, tmp_path: Path) -> None:
    report = run(
        tiny_gpu,
        tmp_path / "run",
        *("--baseline", "flash:block=16", "--candidate", "flash:block=16,kv=2", "--noise", "3", "--power"),
    )
    assert report["verdict"] in ("round-off", "improved", "inconclusive")
    assert all(not arm["faults"] for entry in report["noise"] for arm in entry["arms"])
    largest = max(report["power"]["faults"], key=lambda fault: fault["size"] or 0)
    assert largest["seen"]["gain"]
    assert largest["seen"]["distance"]
    for entry in report["in_place"]:
        assert abs(entry["gain_mean"]) <= entry["gain_limit"]
        assert entry["rms_ratio"] < 1.3


def test_the_end_of_a_window(tiny_gpu: Tiny, tmp_path: Path) -> None:
    report = run(
        tiny_gpu,
        tmp_path / "run",
        *("--score-last", "8", "--baseline", "flash:block=16", "--candidate", "flash:block=16,kv=2"),
    )
    lines = {line["arm"]: line for line in report["coverage"]}
    assert lines["candidate"]["rows"] == 6 * 8 * 2
    assert lines["prompt"]["rows"] == 6 * 55 * 2
    assert report["pairs"][0]["coverage"] == 1.0
