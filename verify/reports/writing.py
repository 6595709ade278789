"""Making the reports of a run from its folder: when it ends, and again whenever asked."""

from __future__ import annotations

from pathlib import Path

from verify.ppl.runfolder import PAGE, REPORT, RunFolder
from verify.reports.gen import gen_html, gen_markdown
from verify.reports.ppl import report_html, report_markdown
from verify.reports.record import StoredGen, StoredPpl, load_run


def write_reports(folder: Path) -> StoredPpl | StoredGen:
    """Write report.md and report.html into the folder of a finished run, from what lies there.

    Raises UsageError where there is no such run, or one of a command whose reports are not made this way.
    """
    stored, into = load_run(folder), RunFolder(folder)
    if isinstance(stored, StoredPpl):
        texts = {REPORT: report_markdown(stored), PAGE: report_html(stored)}
    else:
        texts = {REPORT: gen_markdown(stored), PAGE: gen_html(stored)}
    for name, text in texts.items():
        into.write_text(name, text)
    return stored
