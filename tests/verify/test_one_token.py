"""One query token a call: kernels that choose by the number of tokens are asked what a decode step asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.cli import verify
from support.ppl_runs import Tiny, run
from support.problems import problem
from verify.arms import alone
from verify.arms.alone import AskedRow, TimeShare, asked_rows, regime_of, single_call
from verify.kernels.registry import build_kernel
from verify.rejudge import rejudge_ppl
from verify.reports.record import StoredPpl, load_run

FILE = Path(__file__).parents[1] / "support/user_kernels.py"
ALONE = "asked one query token a call (T = 1, B = 1)"


def kernel(function: str, stated: str = ",acc=f32") -> tuple[str, str]:
    return "--candidate", f"py:{FILE}::{function}{stated}"


def diff(*more: str) -> dict[str, Any]:
    """run.json of a small diff."""
    done = verify(
        "diff", "--shape", "2/1x64", "--n-kv", "300", "--inputs", "gaussian,needles", "--json", *more
    )
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode, done.stderr
    return report


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is: how many are asked is looked at here."""
    monkeypatch.setattr(alone, "UNCOUNTED_S", 1e9)


def test_regimes_are_octaves() -> None:
    assert [regime_of(n) for n in (1, 16, 17, 32, 33, 256, 257, 512)] == [
        (1, 16), (1, 16), (17, 32), (17, 32), (33, 64), (129, 256), (257, 512), (257, 512),
    ]  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 64])
def test_of_each_regime_that_is_scored_eight_rows_are_asked_over_all_windows(parts: int) -> None:
    lengths = range(1, 513)
    for layer in (0, 7):
        found = [
            asked
            for part in range(parts)
            for asked in asked_rows(
                lengths, scored=range(257, 513), seed=0, layer=layer, part=part, parts=parts
            )
        ]
        of_scored = [asked for asked in found if lengths[asked.row] > 256]
        assert len(of_scored) == 8 and {asked.spare for asked in of_scored} == {True, False}
        # Its first and its last row are among them.
        assert {256, 511} <= {asked.row for asked in of_scored}
        assert len(found) - len(of_scored) == 2 * 5


def test_a_row_alone_is_a_call_on_tensors_of_its_own() -> None:
    call = problem(batch=2, rows=40, size=64)
    for asked in (AskedRow(1, 3, spare=False), AskedRow(0, 39, spare=True)):
        one = single_call(call, asked)
        n = int(call.kv_len[asked.sequence, asked.row])
        assert one.shape[:3] == (1, 1, call.shape.keys if asked.spare else n)
        assert torch.equal(one.k[0], call.k[asked.sequence, : one.shape.keys])
        storages = {x.untyped_storage().data_ptr() for x in (call.q, call.k, call.v)}
        assert all(x.untyped_storage().data_ptr() not in storages for x in (one.q, one.k, one.v))
        assert all(x.is_contiguous() for x in (one.q, one.k, one.v))
        # And it is that row.
        eager = build_kernel("eager")
        whole = eager.run(call).out[asked.sequence, asked.row]
        assert torch.equal(eager.run(one).out[0, 0], whole)


def test_single_tokens_take_a_fifth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(alone, "UNCOUNTED_S", 1.0)
    monkeypatch.setattr(alone.time, "monotonic", lambda: now[0])
    share = TimeShare()
    assert share.allows()
    now[0] += 10
    share.add(1.9)
    assert share.allows()
    share.add(0.2)
    assert not share.allows() and share.share == pytest.approx(0.21)
    now[0] += 1
    assert share.allows()


def test_a_kernel_that_is_wrong_for_one_token_alone_is_broken_in_ppl(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(tiny, tmp_path / "run", *kernel("scaled_alone", ""))
    assert (done.returncode, report["verdict"]) == (1, "broken"), report["reasons"]
    assert all(ALONE in reason for reason in report["reasons"])
    (found,) = report["alone"]
    # 2 layers; 33 to 64 keys are scored: 8 rows, and of 1 to 16 and 17 to 32 keys 2.
    assert (found["calls"], found["least"], found["left_out"]) == (2 * (8 + 2 + 2), 8, 0)
    assert found["other_bits"] == found["calls"] and found["against_many"] > 50
    assert found["errors"]["gain_mean"] == pytest.approx(0.02, rel=1e-2)
    # Of the calls that it was right in nothing is said to be more than it is.
    assert report["in_place"][-1]["gain_mean"] == pytest.approx(0, abs=1e-3)
    tokens = {
        line["tokens_a_call"]: line["rows"] for line in report["coverage"] if line["arm"] == "candidate"
    }
    assert tokens == {1: found["calls"], 64: 6 * 64 * 2}
    said = " ".join(done.stdout.split())
    assert "100.0% of them went through the changed plan, in calls of 64 tokens;" in said
    assert "one query token a call (T = 1) was asked of 3.1% of the attention rows" in said
    assert f"{found['calls']} calls, at least 8 a layer and regime that is scored, n_kv 1 to 64" in said
    # And again by what its folder holds.
    stored = load_run(tmp_path / "run")
    assert isinstance(stored, StoredPpl)
    (again,) = rejudge_ppl(stored.run, stored.tokens, stored.layers, stored.alone)
    assert again.now.verdict == "broken" and ALONE in again.now.reasons[0]


def test_a_right_kernel_is_right_alone_and_says_how_often_it_was_asked(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(tiny, tmp_path / "run", *kernel("good"), *kernel("good", ""))
    assert done.returncode in (0, 3) and report["verdict"] in ("improved", "inconclusive", "round-off")
    assert [one["calls"] for one in report["alone"]] == [24, 24]
    assert all(one["against_many"] < 1.2 for one in report["alone"])
    for one in report["alone"]:
        assert [regime["n_kv"] for regime in one["regimes"]] == [16, 32, 64]
        assert all(regime["word"] != "degraded" for regime in one["regimes"])


def test_fewer_digits_for_one_token_are_degraded(tiny: Tiny, tmp_path: Path) -> None:
    _, report = run(tiny, tmp_path / "run", "--baseline", "eager:out=f16", *kernel("coarse_alone", ""))
    assert report["verdict"] == "degraded", report["reasons"]
    assert report["reasons"][0].startswith("one query token a call: degraded")
    (found,) = report["alone"]
    assert {regime["word"] for regime in found["regimes"]} == {"degraded"}
    stored = load_run(tmp_path / "run")
    assert isinstance(stored, StoredPpl)
    assert rejudge_ppl(stored.run, stored.tokens, stored.layers, stored.alone)[0].now.verdict == "degraded"


@pytest.mark.slow
def test_a_cache_without_spare_keys_is_asked_too(tiny: Tiny, tmp_path: Path) -> None:
    _, report = run(tiny, tmp_path / "run", *kernel("last_key_lost_alone"))
    assert report["verdict"] == "broken" and ALONE in report["reasons"][0]


@pytest.mark.parametrize(
    ("function", "verdict"),
    [("refuses_alone", "inconclusive"), pytest.param("raises_alone", "broken", marks=pytest.mark.slow)],
)
def test_what_fails_for_one_token_is_said_to(function: str, verdict: str, tiny: Tiny, tmp_path: Path) -> None:
    _, report = run(tiny, tmp_path / "run", *kernel(function))
    assert report["verdict"] == verdict, report["reasons"]
    assert ALONE in report["reasons"][0]


def test_kernels_of_ours_are_asked_nothing_beside(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(tiny, tmp_path / "run", "--candidate", "eager:heads=split,kv=4")
    assert report["alone"] == [] and "one query token a call" not in done.stdout
    assert {line["tokens_a_call"] for line in report["coverage"]} == {0}
    assert "rows as if alone" in done.stdout


def test_the_time_that_single_tokens_take_is_bounded_and_said(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter([True])
    monkeypatch.setattr(TimeShare, "allows", lambda self: next(asked, False))
    done, report = run(tiny, tmp_path / "run", *kernel("good"))
    (found,) = report["alone"]
    assert found["calls"] + found["left_out"] == 24 and found["left_out"] > 0 and found["least"] < 8
    assert f"for which {found['left_out']} more were left out" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "function",
    [
        "last_key_lost_alone",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("scaled_alone", "raises_alone")),
    ],
)
def test_diff_asks_one_token_too(function: str) -> None:
    report = diff("--baseline", "eager", *kernel(function, ""))
    assert report["verdict"] == "broken", report["reasons"]
    assert ALONE in report["reasons"][0]
    assert all(ALONE in fault for cell in report["cells"] for fault in cell["faults"])


@pytest.mark.slow
def test_diff_of_fewer_digits_and_of_a_right_kernel() -> None:
    report = diff("--baseline", "eager:out=f16", *kernel("coarse_alone", ""), *kernel("good", ""))
    coarse, good = report["pairs"]
    assert coarse["verdict"] == "degraded" and "one query token a call: degraded" in coarse["reasons"][0]
    assert good["verdict"] != "broken" and all(s["word"] != "degraded" for s in good["alone"])
    assert all(cell["alone"]["calls"] == 8 for cell in report["cells"])
    notes = [note for note in report["notes"] if "calls of one query token (T" in note]
    assert len(notes) == 2 and "16 calls of one query token (T = 1, B = 1) in 2 cells" in notes[0]
    tokens = {line["tokens_a_call"] for line in report["coverage"] if line["spec"].startswith("py:")}
    assert tokens == {1, 64}


@pytest.mark.slow
def test_diff_of_a_kernel_that_takes_no_single_token() -> None:
    report = diff("--baseline", "eager", *kernel("refuses_alone"))
    assert report["verdict"] == "inconclusive"
    assert "candidate takes no call of one query token (T = 1)" in report["reasons"][0]


def test_gen_checks_eight_steps_of_each_layer(tiny: Tiny, tmp_path: Path) -> None:
    done = verify(
        "gen", "-m", str(tiny.model), "-p", "one two three", "-n", "9", "--ignore-eos", "--device", "cpu",
        "--out", str(tmp_path / "run"), *kernel("scaled_alone", ""),
    )  # fmt: skip
    report = json.loads((tmp_path / "run/run.json").read_text())
    assert done.returncode == 1 and report["verdict"] == "broken"
    (pair,) = report["pairs"]
    assert pair["judged_least"] >= 8 and pair["judged_calls"] == 18
    assert f"18 calls of one query token held against exact, at least {pair['judged_least']} a layer" in (
        " ".join(done.stdout.split())
    )
    assert 1 in {line["tokens_a_call"] for line in report["coverage"] if line["arm"] == "candidate"}


@pytest.mark.slow
def test_a_promise_of_bits_is_held_on_the_model(tiny: Tiny, tmp_path: Path) -> None:
    _, report = run(tiny, tmp_path / "run", *kernel("alone_in_another_order", ",acc=f32,row_alone=bits"))
    assert report["verdict"] == "broken" and "row_alone=bits" in report["reasons"][0]
    _, report = run(tiny, tmp_path / "other", *kernel("alone_in_another_order"))
    assert report["verdict"] != "broken" and report["alone"][0]["other_bits"] > 0


def test_ppl_looks_at_the_log_sum_exp(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(tiny, tmp_path / "run", *kernel("lse_infinite"))
    assert report["verdict"] == "broken" and done.returncode == 1
    assert "lse error is inf times its bound" in report["reasons"][0]
    found = {one["arm"]: one["lse_budget_ratio"] for one in report["in_place"]}
    assert found["baseline"] is not None and found["baseline"] < 1
