"""What a newcomer types, in a terminal of 80 columns and 24 rows: no word cut, the verdict in sight."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.ppl_runs import Tiny, write_tiny
from support.terminal import COLUMNS, ROWS, Shown, lines_of, on_a_terminal

KERNELS = Path(__file__).parents[1] / "support/user_kernels.py"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def assert_whole(shown: Shown) -> None:
    """Lines fit; but for a command, a path and the running line, which are copied whole."""
    meant = ("verify ", "report: ", "verify: interrupted", "worst element again: ")
    # A path alone on its line may be of any length.
    long = [line for line in shown.too_long if not line.strip().startswith(meant) and " " in line.strip()]
    assert long == [], "\n".join(shown.lines)


def assert_in_sight(shown: Shown, verdict: str) -> None:
    assert f"verdict: {verdict}" in shown.screen, "\n".join(shown.lines)
    assert "next: " in shown.screen
    assert shown.lines[-1].startswith("report: ")


def test_what_a_bar_wrote_over_is_gone() -> None:
    assert lines_of("one\r\nbar \x1b[1m1/2\x1b[0m\r\x1b[2K\x1b[1mtwo\x1b[0m\r\n") == ["one", "two"]
    assert (COLUMNS, ROWS) == (80, 24)


@pytest.mark.slow
def test_help_and_doctor(tmp_path: Path) -> None:
    for words in ((), ("ppl", "--help"), ("help", "verdicts"), ("doctor",)):
        shown = on_a_terminal(*words, folder=tmp_path)
        assert shown.returncode == 0
        assert_whole(shown)


@pytest.mark.slow
def test_a_first_ppl_and_a_resume_after_ctrl_c(tiny: Tiny, tmp_path: Path) -> None:
    asked = (
        "ppl",
        "-m",
        str(tiny.model),
        "-f",
        str(tiny.text),
        "-c",
        "64",
        "--chunks",
        "60",
        "--device",
        "cpu",
    )
    kernels = ("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2", "--memory", "2M")
    shown = on_a_terminal(*asked, *kernels, "--out", "whole", folder=tmp_path)
    assert shown.returncode in (0, 1, 3), "\n".join(shown.lines)
    assert_whole(shown)
    verdict = next(line for line in shown.lines if "verdict: " in line).split("verdict: ")[1].split()[0]
    assert_in_sight(shown, verdict)
    cut = on_a_terminal(
        *asked, *kernels, "--out", "cut", folder=tmp_path, interrupt=lambda said: "[1]" in said
    )
    assert cut.returncode == 130, "\n".join(cut.lines)
    assert any("--resume cut" in line for line in cut.lines[-4:])
    resumed = on_a_terminal("ppl", "--resume", "cut", folder=tmp_path)
    assert resumed.returncode == shown.returncode
    assert_in_sight(resumed, verdict)
    tables = [(tmp_path / name / "tokens.parquet").read_bytes() for name in ("whole", "cut")]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_first_diff_of_a_wrong_kernel(tmp_path: Path) -> None:
    shown = on_a_terminal(
        *(
            "diff",
            "--shape",
            "6/2x16",
            "--n-kv",
            "70",
            "--inputs",
            "gaussian",
            "--rows",
            "8",
            "--device",
            "cpu",
        ),
        *("--candidate", f"py:{KERNELS}::last_key_dropped"),
        folder=tmp_path,
    )
    assert shown.returncode == 1
    assert_whole(shown)
    assert_in_sight(shown, "broken")
