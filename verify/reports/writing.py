"""Making the reports of a run from its folder: when it ends, and again whenever asked."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from verify.judge.words import VerdictWord, words_of
from verify.kernels.said import one_line, visible
from verify.machine.errors import UsageError
from verify.ppl.runfolder import PAGE, REPORT, RESULT, RunFolder
from verify.reports.gen import gen_html, gen_markdown
from verify.reports.page import page_html, page_markdown
from verify.reports.pages import page_of
from verify.reports.ppl import report_html, report_markdown
from verify.reports.record import StoredGen, StoredPage, StoredPpl, load_run

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


def write_run(out: Path | None, content: Mapping[str, Any], again: str, to: TextIO) -> None:
    """A folder of run.json (what `--json` prints, and the command) and its reports, if asked for."""
    if out is None:
        return
    folder = RunFolder.create(out, groups=False)
    folder.write_json(RESULT, {**content, "again": again})
    write_reports(folder.path)
    folder.release()
    print(f"report: {visible(str(folder.path / PAGE))}", file=to, flush=True)


def write_reports(folder: Path, *, foreign: bool = False) -> StoredPpl | StoredGen | StoredPage:
    """Write report.md and report.html into the folder of a finished run, from what lies there.

    foreign: the folder was not written just now, by this process; what it holds may be anything. Raises
    UsageError where there is no such run, or one of a command whose reports are not made this way.
    """
    stored, into = load_run(folder), RunFolder(folder, called="")
    try:
        if isinstance(stored, StoredPpl):
            texts = {REPORT: report_markdown(stored), PAGE: report_html(stored)}
        elif isinstance(stored, StoredPage):
            texts = {
                REPORT: page_markdown(page_of(stored.run, drawn=False)),
                PAGE: page_html(page_of(stored.run)),
            }
        else:
            texts = {REPORT: gen_markdown(stored), PAGE: gen_html(stored)}
        for name, text in texts.items():
            into.write_text(name, text)
    except NOT_OF_A_RUN as error:
        if not foreign:
            raise
        raise not_of_a_run(folder, error) from None
    except KeyboardInterrupt:
        if not into.goes_on:
            kept = (
                f"what was found is kept, its reports are made by: verify report {shlex.quote(str(folder))}"
            )
            print(f"verify: {visible(kept)}", file=sys.stderr)
        raise
    return stored


def said_by(
    stored: StoredPpl | StoredGen | StoredPage,
) -> tuple[str, Sequence[str], Sequence[str], Mapping[str, VerdictWord]]:
    """The verdict of a run, reasons, notes, and what its command's verdicts mean."""
    if isinstance(stored, StoredPage):
        page = page_of(stored.run, drawn=False)
        return page.verdict, page.reasons, page.notes, words_of(page.command)
    run = stored.run
    return run.verdict, run.reasons, run.notes, words_of(run.command)
