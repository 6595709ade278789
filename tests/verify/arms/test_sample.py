"""Windows that are measured: which they are, and what a run says of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from support.cli import assert_refused, verify
from support.tiny_model import write_text, write_tiny_model
from verify.arms.sample import Sample, default_measured


def test_runs_are_whole_and_spread_over_the_text() -> None:
    sample = Sample(564, measured=64, at_once=32)
    chosen = [w for w in range(564) if w in sample]
    assert len(sample) == len(chosen) == 64
    # 18 runs; the middles of their halves.
    assert {w // 32 for w in chosen} == {4, 13}
    assert [sample.ordinal(w) for w in (4 * 32, 13 * 32)] == [0, 1]


@pytest.mark.parametrize(("windows", "measured"), [(4, 64), (4, 0), (10, 3), (1, 1), (0, 5)])
def test_at_one_window_a_run_as_many_are_measured_as_are_wanted(windows: int, measured: int) -> None:
    sample = Sample(windows, measured=measured)
    due = windows if not measured else min(windows, measured)
    assert len(sample) == due == sum(w in sample for w in range(windows))


def test_the_last_run_may_be_short() -> None:
    sample = Sample(10, measured=0, at_once=4)
    assert (len(sample), sample.runs) == (10, 3)


def test_the_default_is_a_number_of_tokens_and_at_least_16_windows() -> None:
    assert default_measured(512) == 64
    assert default_measured(8192) == 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run with every window measured, and with two of six."""
    folder = tmp_path_factory.mktemp("sample")
    model, text = write_tiny_model(folder / "tiny.gguf"), write_text(folder / "text.txt")
    found = {}
    for measured in ("0", "2"):
        found[measured] = out = folder / measured
        base = ("ppl", "-m", str(model), "-f", str(text), "-c", "64", "--chunks", "6", "--device", "cpu")
        kernels = ("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2")
        done = verify(*base, *kernels, "--measured-windows", measured, "--out", str(out))
        assert done.returncode in (0, 3), done.stderr
    return found


def tokens_of(folder: Path, arm: str) -> dict[str, Any]:
    table = pq.read_table(folder / "tokens.parquet").to_pandas()
    return {int(w): rows.reset_index(drop=True) for w, rows in table[table["arm"] == arm].groupby("window")}


def test_a_sample_changes_nothing_that_it_holds(runs: dict[str, Path]) -> None:
    for arm in ("exact", "baseline", "candidate", "control"):
        assert tokens_of(runs["0"], arm).keys() == tokens_of(runs["2"], arm).keys() == set(range(6))
    for arm in ("exact", "baseline", "candidate", "floor", "candidate/frozen", "floor/frozen"):
        whole, part = tokens_of(runs["0"], arm), tokens_of(runs["2"], arm)
        for window, rows in part.items():
            assert rows.drop(columns="arm").equals(whole[window].drop(columns="arm")), (arm, window)
    assert tokens_of(runs["2"], "floor").keys() == tokens_of(runs["2"], "candidate/frozen").keys() == {1, 4}
    layers = pq.read_table(runs["2"] / "layers.parquet")
    assert set(layers["window"].to_pylist()) == {1, 4}


def test_the_run_says_how_many_windows_were_measured(runs: dict[str, Path]) -> None:
    whole, part = (json.loads((runs[n] / "run.json").read_text()) for n in ("0", "2"))
    assert (whole["corpus"]["measured_windows"], part["corpus"]["measured_windows"]) == (6, 2)
    assert not any("windows" in note for note in whole["notes"])
    assert any("measured on 2 of 6 windows" in note for note in part["notes"])
    assert part["pairs"][0]["tokens"] == 6 * 31
    assert part["pairs"][0]["measured_tokens"] == 2 * 31
    # The free-running figures are those of all windows.
    for name in ("dlnppl", "kld_mean", "top1_changes"):
        assert part["pairs"][0][name] == whole["pairs"][0][name]
    assert part["pairs"][0]["theta"] != whole["pairs"][0]["theta"]
    row = next(line for line in (runs["2"] / "report.md").read_text().splitlines() if "| floor |" in line)
    assert row.split("|")[3].strip() == ""


def test_a_number_below_zero_is_refused(tmp_path: Path) -> None:
    done = verify("ppl", "--measured-windows", "-1", "--out", str(tmp_path / "run"))
    assert_refused(done, "--measured-windows -1", "or 0 for all")
