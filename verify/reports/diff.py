"""The kernel diff report on the screen."""

from __future__ import annotations

from typing import TextIO

from verify.diff.results import DiffOutcome, command_of, detectable, summary_lines
from verify.machine.terminal import console_on, print_table_on, say
from verify.reports.diff_page import LINE_COLUMNS, could_see, gravest, line_cells
from verify.reports.tables import table_of
from verify.reports.verdict_lines import print_verdict


def print_outcome(outcome: DiffOutcome, to: TextIO) -> None:
    """A table a candidate, its verdict and why."""
    console = console_on(to)
    for result in outcome.candidates:
        rows = [line_cells(line) for line in summary_lines(result)]
        console.print(f"{result.spec} against {result.baseline}")
        print_table_on(console, table_of(LINE_COLUMNS, rows))
        if len(outcome.candidates) > 1:
            console.print(f"verdict: {result.verdict}: {'; '.join(result.reasons)}", soft_wrap=True)
        for alike in result.looks_like[:1]:
            say(alike, to=to)
        if (worst := result.worst) is not None:
            again = command_of(outcome.settings, worst)
            console.print(f"worst element again: {again}", soft_wrap=True)
        least = detectable(result.strata)
        if least is not None:
            say(could_see(least), to=to)
    several = len(outcome.candidates) > 1
    reasons = [gravest(len(outcome.candidates))] if several else outcome.candidates[0].reasons
    print_verdict(outcome.verdict, reasons, to, outcome.notes)
