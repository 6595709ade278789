"""`verify report`: the reports of a run again, or runs of one command side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from verify.diff.stored_strata import STRATA, unpacked
from verify.judge.run_verdict import VOID
from verify.judge.verdict import EXIT_CODES, Decision, overall
from verify.kernels.said import visible
from verify.machine.errors import UsageError
from verify.machine.files import is_plain_file
from verify.reports.verdict_lines import print_verdict

if TYPE_CHECKING:
    from verify.rejudge import Rejudged


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs")],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of the comparison; default runs/report-TIME")
    ] = None,
    rejudge: Annotated[
        bool, typer.Option("--rejudge", help="judge one run by today's rules, and say what changed")
    ] = False,
) -> int:
    """Run the command; exit 0, or by the verdict with --rejudge."""
    # They wait for jinja2 and pyarrow, which the help and refused options need not.
    from verify.ppl.runfolder import PAGE, REPORT, RunFolder
    from verify.reports.comparison import comparison_page
    from verify.reports.page import page_html, page_markdown
    from verify.reports.record import load_run
    from verify.reports.writing import NOT_OF_A_RUN, not_of_a_run, said_by, write_reports

    if rejudge:
        return _rejudge(runs, out)
    if len(runs) == 1:
        if out is not None:
            raise UsageError(f"--out {out}: is for several runs; the reports of one go into its folder")
        verdict, reasons, notes, words = said_by(write_reports(runs[0], foreign=True))
        print_verdict(verdict, reasons, sys.stdout, notes, words)
        print(f"report: {visible(str(runs[0] / PAGE))}", file=sys.stdout)
        return 0
    stored = [load_run(run) for run in runs]
    try:
        text = page_markdown(comparison_page(stored, drawn=False))
        page = page_html(comparison_page(stored))
    except NOT_OF_A_RUN as error:
        raise not_of_a_run(runs[-1], error) from None
    folder = RunFolder.begin(out, "report", groups=False)
    folder.write_text(REPORT, text)
    folder.write_text(PAGE, page)
    print(f"{text}\nreport: {visible(str(folder.path / PAGE))}", file=sys.stdout)
    return 0


def _rejudge(runs: list[Path], out: Path | None) -> int:
    """The folder stays as it is: what it would say today is printed."""
    from verify.rejudge import rejudge_diff, rejudge_gen, rejudge_ppl
    from verify.reports.record import StoredPage, StoredPpl, load_run

    if len(runs) != 1 or out is not None:
        raise UsageError("--rejudge: expected one run, and no --out: it prints what the run is called today")
    if is_plain_file(runs[0] / STRATA):
        kept = [pair for _, pair in unpacked(runs[0] / STRATA)]
        if not kept:
            raise UsageError(f"{runs[0]}: the run compared nothing, there is nothing to judge again")
        margin = kept[0].evidence.margin
        return _say(margin, rejudge_diff(kept), overall([Decision(p.verdict, []) for p in kept]))
    stored = load_run(runs[0])
    if isinstance(stored, StoredPage):
        raise UsageError(f"--rejudge {runs[0]}: expected a run of verify ppl, gen or diff")
    if stored.run.verdict == VOID:
        raise UsageError(f"{runs[0]}: the run is void, there is nothing to judge again")
    if isinstance(stored, StoredPpl):
        pairs = rejudge_ppl(stored.run, stored.tokens, stored.layers, stored.alone)
    else:
        pairs = rejudge_gen(stored.run)
    return _say(float(stored.run.settings.get("margin", 1.25)), pairs, stored.run.verdict)


def _say(margin: float, pairs: list[Rejudged], was: str) -> int:
    from verify.rejudge import rules_in_words, verdict_of

    verdict = verdict_of(pairs)
    print(rules_in_words(margin))
    for pair in pairs:
        print(pair)
    changed = sum(pair.changed for pair in pairs)
    print(f"verdict: {verdict}; it was {was}; {changed} of {len(pairs)} pairs changed")
    return EXIT_CODES[verdict]
