"""Making the reports of a run from its folder: when it ends, and again whenever asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jinja2

from verify.machine.errors import UsageError
from verify.ppl.runfolder import PAGE, REPORT, RESULT, RunFolder
from verify.reports import gen, ppl
from verify.reports.record import RunRecord


class Reports(NamedTuple):
    """The two reports of one command."""

    markdown: Callable[[RunRecord], str]
    html: Callable[[RunRecord], str]


REPORTS = {
    "ppl": Reports(ppl.report_markdown, ppl.report_html),
    "gen": Reports(gen.gen_markdown, gen.gen_html),
}


def write_reports(folder: Path) -> RunRecord:
    """Write report.md and report.html into the folder of a finished run, from what lies there.

    Raises UsageError where there is no such run, or one of a command whose reports are not made this way.
    """
    record = RunRecord.load(folder)
    command = record.run["command"]
    if command not in REPORTS:
        known = ", ".join(REPORTS)
        raise UsageError(f"{folder}: a run of verify {command}, expected one of: {known}")
    made, into = REPORTS[command], RunFolder(folder)
    try:
        texts = {REPORT: made.markdown(record), PAGE: made.html(record)}
    except (KeyError, jinja2.UndefinedError) as error:
        raise UsageError(f"{folder / RESULT}: not a whole run.json: {error}") from None
    for name, text in texts.items():
        into.write_text(name, text)
    return record
