"""Making the reports of a run from its folder: when it ends, and again whenever asked."""

from __future__ import annotations

from pathlib import Path

from verify.kernels.said import one_line
from verify.machine.errors import UsageError
from verify.ppl.runfolder import PAGE, REPORT, RunFolder
from verify.reports.gen import gen_html, gen_markdown
from verify.reports.ppl import report_html, report_markdown
from verify.reports.record import StoredGen, StoredPpl, load_run

# What figures that contradict one another, and tables of other columns, make of a report.
NOT_OF_A_RUN = (
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    StopIteration,
    MemoryError,
)


def not_of_a_run(folder: Path, error: Exception) -> UsageError:
    """The one line for a stranger's folder whose parts do not fit together; what is a line already stays."""
    if isinstance(error, UsageError):
        return error
    said = one_line(f"{type(error).__name__}: {error}", 200)
    return UsageError(f"{folder}: what it holds is not what a run leaves: {said}")


def write_reports(folder: Path, *, foreign: bool = False) -> StoredPpl | StoredGen:
    """Write report.md and report.html into the folder of a finished run, from what lies there.

    foreign: the folder was not written just now, by this process; what it holds may be anything. Raises
    UsageError where there is no such run, or one of a command whose reports are not made this way.
    """
    stored, into = load_run(folder), RunFolder(folder, called="")
    try:
        if isinstance(stored, StoredPpl):
            texts = {REPORT: report_markdown(stored), PAGE: report_html(stored)}
        else:
            texts = {REPORT: gen_markdown(stored), PAGE: gen_html(stored)}
    except NOT_OF_A_RUN as error:
        if not foreign:
            raise
        raise not_of_a_run(folder, error) from None
    for name, text in texts.items():
        into.write_text(name, text)
    return stored
