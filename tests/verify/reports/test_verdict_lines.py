"""How a verdict meets the eye: one reason a line in a pipe, a box of whole words on a terminal."""

from __future__ import annotations

import io
import math
import re

import pytest

from verify.reports.diff_page import could_see
from verify.reports.templating import least_ratio
from verify.reports.verdict_lines import print_verdict, verdict_lines

REASONS = ["err/budget 40 at head 3", "a gain of 2%"]
NOTES = ["`flash` ran as `eager`, the same arithmetic in plain torch (no CUDA device)"]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_each_reason_and_note_has_a_line_of_its_own_and_the_next_step_is_last() -> None:
    lines = verdict_lines("broken", REASONS, NOTES)
    assert lines[:3] == [
        "verdict: broken: err/budget 40 at head 3",
        "  and: a gain of 2%",
        f"  note: {NOTES[0]}",
    ]
    assert lines[-1].startswith("next: ") and len(lines) == 4


def test_a_word_that_is_no_verdict_of_ours_gets_no_next_step() -> None:
    assert verdict_lines("passed", []) == ["verdict: passed"]


def test_a_pipe_gets_whole_lines() -> None:
    to = io.StringIO()
    print_verdict("broken", ["word " * 60], to)
    assert to.getvalue().splitlines()[0] == "verdict: broken: " + "word " * 60


@pytest.mark.parametrize("width", [40, 80])
def test_a_terminal_gets_a_box_that_cuts_no_word(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    to = Screen()
    print_verdict("broken", REASONS, to, NOTES)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", to.getvalue()).splitlines()
    # Notes stand above the box.
    box = next(i for i, line in enumerate(lines) if "verdict: broken" in line)
    assert lines[0].startswith("note: ") and box > 0 and all(len(line) <= width for line in lines)
    told = [word for line in lines for word in line.strip("│╭╮╰╯─ |+-").split()]
    assert {"err/budget", "arithmetic", "torch", "shrinks"} <= set(told)
    assert {"means:", "next:"} <= set(told)


@pytest.mark.parametrize(
    ("least", "cell"), [(1.5, "1.5"), (2e4, "none"), (1e216, "none"), (math.inf, "none")]
)
def test_a_ratio_that_nothing_reaches_is_not_printed(least: float, cell: str) -> None:
    assert least_ratio(least) == cell
    said = could_see(least)
    assert ("rms ratio from 1.5" in said) == (cell == "1.5") and "beyond its budget" in said
    assert ("no limit that says anything" in said) == (cell == "none") and "e+" not in said
