"""`verify selftest`: a few faults and variants through the whole matrix, and the command's exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support.cli import assert_refused, verify
from verify import selftest
from verify.commands import selftest as command
from verify.kernels.faults import FAULTS, PLAN_FAULTS, VARIANTS
from verify.kernels.judging.families import draw
from verify.reports.selftest import summary
from verify.selftest import run_selftest

SOME = {
    "base-2 merge", "wrong by 2e-4", "never ran", "base-2 lse", "f16 overflow", "plain",
    "offset 3 x 0.6931, f16 sums",
}  # fmt: skip
# Merges of their own, a broken one and a clean one.
MERGES = {"weights in 16 bits", "tree merge"}
PLANS = {fault.name for fault in PLAN_FAULTS}


# Inputs that between them show what is wrong with each of these, and cases of each law of plans.
FEW_FAMILIES = ("gaussian", "needles", "near-overflow", "massive")
FEW_PLAN_CASES = 60


def with_few_inputs(patch: pytest.MonkeyPatch) -> None:
    families = selftest.FAMILIES
    patch.setattr(selftest, "FAMILIES", {name: families[name] for name in FEW_FAMILIES})
    patch.setattr(selftest, "PLAN_CASES", FEW_PLAN_CASES)


@pytest.fixture(scope="module")
def result() -> selftest.SelftestResult:
    with pytest.MonkeyPatch.context() as patch:
        with_few_inputs(patch)
        return run_selftest(
            1, only=lambda name: name in SOME | SHARED | PLANS | MERGES | {"offset wraps at 2^31"}
        )


@pytest.fixture(autouse=True)
def _few_inputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it is asked by the slow tests."""
    if not request.node.get_closest_marker("slow"):
        with_few_inputs(monkeypatch)


def test_faults_are_caught_and_clean_kernels_are_not(result: selftest.SelftestResult) -> None:
    assert [s.name for s in result.missed] == []
    assert [s.name for s in result.false_alarms] == []
    assert result.exit_code == 0
    assert result.score == 1


# A fault, one that what is read off it shows, and a clean kernel.
SHARED = {"plain", "last key dropped", "wrong by 2e-4"}


def test_processes_find_what_one_does(result: selftest.SelftestResult) -> None:
    """They are forked: what is set here, the few inputs of these tests, is set there."""
    told: list[str] = []
    shared = run_selftest(1, processes=2, only=SHARED.__contains__, progress=told.append)
    assert [s.name for s in shared.subjects] == ["last key dropped", "wrong by 2e-4", "plain"]
    assert shared.subjects == [s for s in result.subjects if s.name in SHARED]
    # What it takes itself, in order.
    assert 0 < len(told) <= len(SHARED) + 1
    assert all(line.startswith(("seed 1 of 1: ", "read off it: ")) for line in told)


def test_each_fault_is_seen_by_those_who_can_see_it(result: selftest.SelftestResult) -> None:
    by = {s.name: {d for d, count in s.detectors.items() if count} for s in result.subjects}
    assert by["never ran"] == {"trace"}
    assert by["base-2 lse"] == {"probe", "lse"}
    assert by["f16 overflow"] == {"budget"}
    assert by["plain"] == set()
    assert {"probe", "budget", "rms"} <= by["base-2 merge"]
    assert "budget" not in by["wrong by 2e-4"]
    assert "gain" in by["wrong by 2e-4"]
    # A plan that leaves keys or heads out shows in results too, one that cuts elsewhere in what ran.
    assert all("law" in by[name] for name in PLANS)
    assert {"probe", "budget"} <= by["tail lost"] & by["remainder lost"]
    assert by["cuts inside tiles"] == {"trace", "law"}
    assert by["gate too narrow"] == {"law"}
    # A merge of its own answers to the laws of merges; a kernel that merges as ours does is not asked.
    assert {name for name in SOME if "law" in by[name]} == {"base-2 merge"}
    assert "law" in by["weights in 16 bits"] and "law" not in by["tree merge"]


def test_what_needs_a_gpu_is_listed_and_not_counted(result: selftest.SelftestResult) -> None:
    (far,) = [s for s in result.subjects if s.name == "offset wraps at 2^31"]
    assert far.skipped == "needs a GPU"
    assert far not in result.faults


def test_a_missed_fault_and_a_false_alarm_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean kernel in the place of a fault is missed; a fault in the place of a clean kernel alarms."""
    harmless = FAULTS[0]._replace(name="harmless", build=VARIANTS[0].build)
    broken = VARIANTS[0]._replace(name="broken", build=FAULTS[0].build)
    monkeypatch.setattr(selftest, "FAULTS", (harmless,))
    monkeypatch.setattr(selftest, "PLAN_FAULTS", ())
    monkeypatch.setattr(selftest, "VARIANTS", (broken,))
    found = run_selftest(1)
    assert [s.name for s in found.missed] == ["harmless"]
    assert [s.name for s in found.false_alarms] == ["broken"]
    assert found.exit_code == 1
    lines = "\n".join(summary(found))
    assert "missed: harmless" in lines and "false alarm: broken" in lines


def test_json_is_all_that_stdout_holds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "FAULTS", FAULTS[:1])
    monkeypatch.setattr(selftest, "PLAN_FAULTS", ())
    monkeypatch.setattr(selftest, "VARIANTS", VARIANTS[:1])
    assert command.command(seeds=1, device="cpu", json_=True) == 0
    written = capsys.readouterr()
    found = json.loads(written.out)
    assert found["mutation_score"] == 1
    assert found["subjects"][0]["references"] == list(FAULTS[0].references)
    assert "known faults" in written.err


def test_bad_seeds_are_refused_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "verify", "selftest", "--seeds", "0"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "seeds" in done.stderr


def test_every_known_fault_is_run() -> None:
    asked = [trial.subject.name for trial in selftest._trials()]
    assert asked == [subject.name for subject in (*FAULTS, *PLAN_FAULTS, *VARIANTS)]


@pytest.mark.parametrize("family", selftest.SELFTEST_CALLS)
def test_every_subject_takes_every_kind_of_call(family: str) -> None:
    """One that does not is an internal error of the whole command."""
    call = draw(family, selftest.SIZES, 0)
    for trial in selftest._trials():
        if trial.needs != "cuda":
            assert trial.build().run(call).out.shape == call.q.shape, trial.subject.name


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_whole_corpus_over_20_seeds() -> None:
    found = run_selftest(20)
    assert [s.name for s in found.missed] == []
    assert [s.name for s in found.false_alarms] == []
    assert [s.name for s in found.false_alarms_unstated] == []
    assert [s.name for s in found.missed_unstated] == []


# What a float16 kernel of which nothing is stated may do as well: P of the largest key rounded the same way
# in every row.
HIDDEN_UNSTATED = {"wrong by 2e-4"}


def test_clean_offsets_are_clean_and_faults_are_caught_though_nothing_is_stated(
    result: selftest.SelftestResult,
) -> None:
    assert [s.name for s in result.missed_unstated] == []
    assert {s.name for s in result.faults if s.read} == HIDDEN_UNSTATED
    assert [s.name for s in result.false_alarms_unstated] == []
    said = "\n".join(summary(result))
    assert f"{len(result.faults)} of {len(result.faults)} (by what is read off it: wrong by 2e-4)" in said


def test_what_no_arithmetic_that_is_read_shows_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_read", lambda *_: selftest.KnownReadings(()))
    found = run_selftest(1, only=lambda name: name in HIDDEN_UNSTATED)
    assert {s.name for s in found.missed_unstated} == HIDDEN_UNSTATED
    assert found.missed == [] and found.exit_code == 1


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_whole_corpus_is_judged_alike_by_what_is_read_off_it() -> None:
    found = run_selftest(1, identified=True)
    assert [s.name for s in found.missed_unstated] == []
    assert [s.name for s in found.false_alarms_unstated] == []


def test_a_device_that_is_not_one() -> None:
    assert_refused(verify("selftest", "--device", "tpu"), "--device tpu", "expected cpu")
