"""What is handed over to whoever runs a command: JUnit XML, GitHub's annotations and the job's summary."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from support.cli import assert_refused, verify
from support.tiny_model import write_text, write_tiny_model
from verify.distrust import judging
from verify.machine.errors import UsageError
from verify.reports.ci import CheckedCase, annotate, check_ci_options, hand_over, summary_of

KERNELS = Path(__file__).parents[2] / "support/user_kernels.py"
DIFF = ("diff", "--shape", "2/1x32", "--n-kv", "33", "--inputs", "probes,gaussian", "--device", "cpu")
CASES = [
    CheckedCase("diff", "a, b: c", "failed", "50% off", "50% off\nagain: verify diff"),
    CheckedCase("diff", "d", "passed"),
    CheckedCase("diff", "e", "skipped", "takes no sinks | at all"),
    CheckedCase("diff", "f", "warned", "look"),
]


def test_annotations_are_escaped_as_github_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    annotate(CASES, sys.stdout, Path("k,1.py"))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "::error file=k%2C1.py,title=diff%3A a%2C b%3A c::50%25 off%0Aagain: verify diff",
        "::warning file=k%2C1.py,title=diff%3A f::look",
    ]


def test_the_summary_has_what_failed_first() -> None:
    rows = [line for line in summary_of(CASES, "a run").splitlines() if line.startswith("| diff")]
    assert [row.split(" | ")[1] for row in rows] == ["failed", "warned", "skipped", "passed"]
    assert "takes no sinks \\| at all" in rows[2]


def test_junit_has_a_case_a_case(tmp_path: Path) -> None:
    hand_over(CASES, "a run", "text", tmp_path / "out.xml")
    suite = ElementTree.parse(tmp_path / "out.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "1", "1")
    failure = suite.find("testcase/failure")
    assert failure is not None and failure.get("message") == "50% off" and "again" in (failure.text or "")


def test_bad_options_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--format sarif: expected one of text, github"):
        check_ci_options("sarif", None)
    with pytest.raises(UsageError, match="no such folder"):
        check_ci_options("text", tmp_path / "nowhere/out.xml")
    assert_refused(verify(*DIFF, "--format", "xml"), "--format xml")


def test_a_wrong_kernel_in_diff_on_github(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    done = verify(
        *DIFF, "--candidate", f"py:{KERNELS}::last_key_dropped,acc=f32", "--format", "github", "--json",
        "--junit", str(tmp_path / "diff.xml"), "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 1 and json.loads(done.stdout)["verdict"] == "broken"
    errors = [line for line in done.stderr.splitlines() if line.startswith("::error ")]
    assert any("key 32" in line and "again: verify diff" in line for line in errors), done.stderr
    assert page.read_text() == (tmp_path / "run/report.md").read_text()
    suite = ElementTree.parse(tmp_path / "diff.xml").getroot()
    assert int(suite.get("failures", "0")) >= 2


def test_ppl_and_props_hand_over_too(tmp_path: Path) -> None:
    model, text = write_tiny_model(tmp_path / "tiny.gguf"), write_text(tmp_path / "text.txt")
    done = verify(
        "ppl", "-m", str(model), "-f", str(text), "-c", "64", "--chunks", "2", "--device", "cpu",
        "--baseline", "eager", "--candidate", "eager:block=16", "--out", str(tmp_path / "run"),
        "--junit", str(tmp_path / "ppl.xml"), "--format", "github",
    )  # fmt: skip
    suite = ElementTree.parse(tmp_path / "ppl.xml").getroot()
    (case,) = suite.iter("testcase")
    assert case.get("name") == "candidate against baseline (decode)"
    # Two windows are too few: what is undecided fails, as its exit code does.
    assert done.returncode == 3 and case.find("failure") is not None
    assert "::error " in done.stderr
    done = verify("props", f"py:{KERNELS}::last_key_dropped", "--law", "within-budget", "--examples", "30",
                  "--seed", "1", "--format", "github", "--device", "cpu")  # fmt: skip
    assert done.returncode == 1 and "::error title=law.attention%3A within-budget::" in done.stderr


def test_gen_and_judge_hand_over_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    model = write_tiny_model(tmp_path / "tiny.gguf")
    done = verify(
        "gen", "-m", str(model), "-p", "The river", "-n", "8", "--device", "cpu", "--baseline", "eager",
        "--candidate", f"py:{KERNELS}::last_key_dropped,acc=f32", "--out", str(tmp_path / "run"),
        "--junit", str(tmp_path / "gen.xml"), "--format", "github",
    )  # fmt: skip
    assert done.returncode == 1 and "::error " in done.stderr, done.stderr
    suite = ElementTree.parse(tmp_path / "gen.xml").getroot()
    (case,) = suite.iter("testcase")
    failure = case.find("failure")
    assert failure is not None and "candidate" in (failure.get("message") or "")
    assert "broken" in page.read_text()
    page.unlink()
    # One law stands for all: how they are handed over is asked, not what they find.
    monkeypatch.setattr(judging, "LAWS", {"within-budget": judging.LAWS["within-budget"]})
    planted = KERNELS.with_name("cheats") / "planted.py"
    done = verify(
        "judge", f"{planted}::zeros,acc=f32", "--n-kv", "33", "--examples", "1", "--device", "cpu",
        "--junit", str(tmp_path / "judge.xml"), "--format", "github",
    )  # fmt: skip
    assert done.returncode == 1
    assert any(line.startswith(f"::error file={planted}") for line in done.stderr.splitlines()), done.stderr
    failed = {
        case.get("name")
        for case in ElementTree.parse(tmp_path / "judge.xml").getroot().iter("testcase")
        if case.find("failure") is not None
    }
    assert "zeros" in " ".join(filter(None, failed)) and "zeros" in page.read_text()
