"""`verify ppl` in calls as engines make them: several tokens, pages, sequences; what these alone change."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from support.cli import verify
from support.ppl_runs import Tiny, run
from verify.ppl.evidence.path_alone import is_tied_row
from verify.ppl.record import PathAloneRecord
from verify.ppl.settings import PplSettings
from verify.reports.path_alone import path_alone_sentence
from verify.reports.record import StoredPpl, load_run, ppl_command

KERNELS = Path(__file__).parents[2] / "support/user_kernels.py"
SMALL = ("-c", "32", "--chunks", "2")


def test_a_right_kernel_in_calls_of_four_tokens(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ("--chunks", "4", "--path", "several", "--candidate", "sdpa:math")
    done, report = run(tiny, out, *more)
    assert (done.returncode, report["verdict"]) == (0, "round-off"), done.stdout + done.stderr
    (pair,) = report["pairs"]
    assert (pair["path"], pair["coverage"], pair["bitwise_equal"]) == ("several", 1.0, False)
    # A window of 64 rows is sixteen calls; two layers, four windows.
    assert pair["judged_calls"] == 2 * 4 * 16
    calls = {arm["name"]: (arm["path"], arm["calls"]) for arm in report["arms"]}
    assert calls["baseline"] == calls["control"] == ("decode", "")
    assert calls["candidate"] == ("several", "calls of 4 tokens")
    (line,) = [line for line in report["coverage"] if line["arm"] == "candidate"]
    assert (line["tokens_a_call"], line["page"], line["sequences"]) == (4, 0, 1)
    assert line["rows"] == 2 * 4 * 64
    (found,) = report["path_alone"]
    assert (found["n_q"], found["tokens"], found["floor_tokens"]) == (4, 4 * 31, 4 * 31)
    assert found["top1_changes"] == pair["top1_changes"] >= found["ties"] + found["not_known"]
    sentence = path_alone_sentence(PathAloneRecord(**found))
    assert sentence in done.stdout and sentence in (out / "report.md").read_text()
    assert "T = 4" in done.stdout
    stored = load_run(out)
    assert isinstance(stored, StoredPpl)
    words = shlex.split(ppl_command(stored.run))
    assert {"several", "4", "--n-q"} <= set(words) and "--baseline" not in words


def test_a_kernel_that_is_wrong_for_four_tokens_alone_is_broken(tiny: Tiny, tmp_path: Path) -> None:
    spec = f"py:{KERNELS}::four_tokens"
    done, report = run(tiny, tmp_path / "four", *SMALL, "--path", "several", "--candidate", spec)
    assert (done.returncode, report["verdict"]) == (1, "broken")
    assert all(reason.startswith("candidate: ") for reason in report["reasons"])


def test_single_tokens_are_not_laid_beside_calls_of_some(tiny: Tiny, tmp_path: Path) -> None:
    """One row alone has other sums than four together have, and less error."""
    more = ("--path", "several", "--candidate", f"py:{KERNELS}::good")
    _, report = run(tiny, tmp_path / "run", *SMALL, *more)
    (line,) = report["alone"]
    assert (line["arm"], line["calls"] > 0, line["regimes"]) == ("baseline", True, [])
    assert not any("one query token" in reason for reason in report["reasons"])
    alone = pq.read_table(tmp_path / "run/alone.parquet")
    assert set(alone["arm"].to_pylist()) == {"baseline"}


@pytest.mark.parametrize(
    ("more", "path", "tokens", "page", "sequences"),
    [
        (["--pages", "8"], "decode", 0, 8, 1),
        (["--pages", "8", "--path", "prefill"], "prefill", 0, 8, 1),
        (["--sequences", "2"], "decode", 1, 0, 2),
        (["--sequences", "2", "--path", "prefill"], "prefill", 0, 0, 2),
        (["--path", "several", "--n-q", "2", "--pages", "16", "--sequences", "2"], "several", 2, 16, 2),
    ],
)
def test_pages_and_sequences_change_no_bit_of_a_kernel_of_ours(
    tiny: Tiny, tmp_path: Path, more: list[str], path: str, tokens: int, page: int, sequences: int
) -> None:
    done, report = run(tiny, tmp_path / "run", *SMALL, *more, "--candidate", "eager:block=16,kv=2")
    assert (done.returncode, report["verdict"]) == (0, "identical"), done.stdout + done.stderr
    assert {
        (line["path"], line["tokens_a_call"], line["page"], line["sequences"])
        for line in report["coverage"]
        if line["arm"] == "candidate"
    } == {(path, tokens, page, sequences)}
    assert {(x["page"], x["sequences"]) for x in report["coverage"] if x["arm"] == "baseline"} == {(0, 1)}
    (found,) = report["path_alone"]
    assert found["bitwise_equal"] and f"went through {found['calls']}" in report["reasons"][0]


def test_a_named_baseline_is_asked_in_the_same_calls(tiny: Tiny, tmp_path: Path) -> None:
    more = ("--path", "several", "--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2")
    done, report = run(tiny, tmp_path / "run", *SMALL, *more)
    assert report["verdict"] in ("round-off", "inconclusive"), done.stderr
    assert report["path_alone"] == []
    assert {line["tokens_a_call"] for line in report["coverage"]} == {4}
    more = ("--pages", "8", "--baseline", "eager", "--candidate", "eager")
    _, report = run(tiny, tmp_path / "same", *SMALL, *more)
    assert report["verdict"] == "inconclusive" and "same specification" in report["reasons"][0]


def test_a_run_in_forms_goes_on_where_it_stopped(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ("--path", "several", "--sequences", "2", "--candidate", "eager", "--memory", "60K")
    _, whole = run(tiny, out, "-c", "32", "--chunks", "4", *more)
    tokens = (out / "tokens.parquet").read_bytes()
    done = verify("ppl", "--resume", str(out))
    assert done.returncode == 2 and "finished" in done.stderr
    _, again = run(tiny, tmp_path / "again", "-c", "32", "--chunks", "4", *more[:-2])
    assert (tmp_path / "again/tokens.parquet").read_bytes() == tokens
    assert whole["speed"]["groups"] > again["speed"]["groups"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--n-q", "4"], "--n-q 4: expected --path several beside it"),
        (["--path", "several", "--n-q", "17"], "--n-q 17: expected 2 to 16 query tokens a call"),
        (["--path", "some"], "--path some: expected decode, several, prefill or both"),
        (["--pages", "-1"], "--pages -1: expected keys a page from 1"),
        (["--sequences", "0"], "--sequences 0: expected at least 1"),
        (["--sequences", "3"], "--sequences 3: expected as many windows at least, --chunks is 2"),
        (["--sequences", "2", "--path", "prefill", "--candidate", "sdpa:math"], "takes no packed sequences"),
        (["--baseline", "own"], "--baseline own: is the candidate's own kernel in plain calls"),
        (["--pages", "16", "--candidate", "sdpa:math"], "'sdpa:math' does not fit this model: "),
        (["--pages", "16", "--candidate", f"py:{KERNELS}::good"], "does not fit this model: takes no pages"),
    ],
)
def test_calls_that_nobody_takes_are_refused_in_one_line(
    tiny: Tiny, tmp_path: Path, given: list[str], said: str
) -> None:
    done, report = run(tiny, tmp_path / "run", *SMALL, *given)
    assert (done.returncode, report) == (2, {})
    assert said in done.stderr and done.stderr.count("\n") == 1


FOUND = PathAloneRecord(
    candidate="candidate",
    calls="calls of 4 tokens",
    n_q=4,
    page=0,
    sequences=1,
    tokens=510,
    top1_changes=0,
    floor_changes=1,
    floor_tokens=510,
    ties=0,
    not_known=0,
    bitwise_equal=False,
)


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        ({"bitwise_equal": True}, "lossless, greedy text with drafts of 4 is the text without, to the bit"),
        ({}, ": lossless, greedy text with drafts of 4 is the text without, as far as this text shows"),
        ({"n_q": 1}, "greedy text with such calls is the text without, as far as this text shows"),
        ({"top1_changes": 2, "ties": 2}, "decides: lossless but for ties, greedy text with drafts of 4 may"
         " differ there, and is as good"),
        ({"top1_changes": 3, "ties": 1}, "2 of them rounding alone does not explain: not lossless, greedy"
         " text with drafts of 4 is another text"),
        ({"top1_changes": 3, "ties": 1, "not_known": 2}, "not known what rounding alone does there"),
    ],
)  # fmt: skip
def test_the_sentence_for_users_of_speculation(change: dict[str, Any], ends: str) -> None:
    found = replace(FOUND, **change)
    said = path_alone_sentence(found)
    assert said.endswith(ends)
    assert f"of {found.top1_changes} of 510 tokens" in said
    assert "one rounding of noise changes 1 of 510" in said


def test_a_change_is_a_tie_where_rounding_moves_as_much() -> None:
    margins = {"reference": 1e-3, "candidate": -2e-3}
    row: dict[str, float] = {f"logp_{arm}_candidate": -2.0 for arm in margins}
    row |= {f"logp_{arm}_reference": -2.0 + margin for arm, margin in margins.items()}
    # One rounding moves the two by 2 sqrt(KLD); three times that is 3e-3 here.
    assert is_tied_row(row | {"floor_kld": 2.5e-7 * 1.01}) is True
    assert is_tied_row(row | {"floor_kld": 2.5e-7 * 0.99}) is False
    assert is_tied_row(row | {"floor_kld": float("nan")}) is None
    assert is_tied_row(row | {"logp_reference_candidate": float("nan"), "floor_kld": 1.0}) is False


def test_settings_of_before_are_of_plain_calls() -> None:
    assert PplSettings.from_json({"candidates": ["eager"]}).form.is_plain
