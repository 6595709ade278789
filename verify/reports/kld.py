"""What `verify kld` prints of its files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TextIO

from verify.engines.closing_table import HEADER, ClosingRow, cells, comma_separated, markdown
from verify.engines.conclusion import Class, Comparison, bounds_text
from verify.engines.divergence import FileScores, clip_width
from verify.engines.kld_table import table_lines
from verify.engines.logits_file import CLIP_WIDTHS, Layout
from verify.judge.words import VERDICTS_OF_FILES
from verify.machine.errors import UsageError
from verify.machine.terminal import Progress, counted
from verify.ppl.perplexity import final_line, perplexity
from verify.reports.progress import progress_of
from verify.reports.tables import print_table
from verify.reports.verdict_lines import print_verdict

# More windows than this are not listed one by one.
MOST_WINDOWS = 16


class KldScreen:
    """Each file and pair as it is known, on `to`; a bar on stderr while a file is read."""

    def __init__(self, to: TextIO) -> None:
        self.to = to

    def reading(self, path: str) -> AbstractContextManager[Progress | None]:
        return progress_of(path)

    def file(self, path: str, layout: Layout, scores: FileScores) -> None:
        print_file(path, layout, scores, self.to)

    def comparison(self, found: Comparison) -> None:
        print_comparison(found, self.to)

    def closing_table(self, rows: Sequence[ClosingRow]) -> None:
        """A row a file, as they are published; one comparison alone has all of it above."""
        if len(rows) > 2:
            print(file=self.to)
            print_table(HEADER, [cells(row) for row in rows], self.to)

    def write_tables(self, rows: Sequence[ClosingRow], **files: Path | None) -> None:
        """The closing table as `markdown` and as `csv`. Raises UsageError."""
        for form, path in files.items():
            if path is None:
                continue
            write = {"markdown": markdown, "csv": comma_separated}[form]
            try:
                path.write_text(write(rows), encoding="utf-8")
            except OSError as error:
                raise UsageError(f"--{form} {path}: cannot be written: {error.strerror or error}") from None
            print(f"table: {path}", file=self.to)


def print_file(path: str, layout: Layout, scores: FileScores, to: TextIO) -> None:
    """One file: its perplexity, and what its 16 bits hold."""
    width = clip_width(scores)
    writer = next((name for name, w in CLIP_WIDTHS.items() if w == width), None)
    clip = f"clipped {width:g} nats below the largest, as {writer} does" if width else "not clipped"
    print(
        f"{path}: {layout.n_chunk} windows of {layout.n_ctx}, vocabulary {layout.n_vocab},"
        f" {scores.nll.size} scored tokens; {clip}",
        file=to,
    )
    if not scores.finite.all():
        print(f"  {counted(int((~scores.finite).sum()), 'record')} with NaN or Inf", file=to)
        return
    print(
        f"  {final_line(perplexity(scores.nll.ravel()), n_ctx=layout.n_ctx, windows=layout.n_chunk)}", file=to
    )
    print(
        f"  steps of {scores.step.min():.2g} to {scores.step.max():.2g} nats;"
        f" {int((scores.margin == 0).sum())} tokens whose two most likely tokens 16 bits do not tell apart;"
        f" {int(scores.clipped.sum())} tokens that came lie at the clip: their nll is a lower bound",
        file=to,
    )


def print_comparison(c: Comparison, to: TextIO) -> None:
    """One pair: the program's own table, then what it cannot show."""
    if c.table is not None and c.resolution is not None and c.dnll is not None and c.kld is not None:
        print(file=to)
        for line in table_lines(c.table):
            print(line, file=to)
        r = c.resolution
        print(
            "\n====== What the table cannot show ======\n"
            f"Resolution (99.9 %): a step of {r.step:.2g} nats; one token: nll {r.token_nll:.2g},"
            f" KLD {r.token_kld:.2g}; means over all: ln PPL {r.mean_nll:.2g}, KLD {r.mean_kld:.2g}.\n"
            f"  {r.negative} of {sum(x.tokens for x in c.by_position)} tokens have a negative KLD,"
            " which no true one is: rounding.\n"
            f"Mean ln(PPL(Q)/PPL(base)) {c.dnll.mean:+.3g}, paired 99.9 % interval {c.dnll.low:+.3g} to"
            f" {c.dnll.high:+.3g}; mean KLD {c.kld.mean:.3g}, {bounds_text(c.kld)} (about {c.dnll.scope}).",
            file=to,
        )
        if c.clip is not None:
            print(
                f"The files are clipped unlike: both are compared as if clipped {c.clip:g} nats below the"
                f" largest, the narrower; {c.at_clip} tokens that came lie there, and count alike.",
                file=to,
            )
        shown = c.windows[:MOST_WINDOWS]
        rows = [[str(w + 1), f"{dnll:+.3e}", f"{kld:.3e}"] for w, (dnll, kld) in enumerate(shown)]
        print_table(("window", "ln PPL(Q)/PPL(base)", "mean KLD"), rows, to)
        if len(c.windows) > len(shown):
            print(f"... and {len(c.windows) - len(shown)} more windows (--json has them)", file=to)
        _print_classes("margin of the base's top token", c.by_margin, to)
        _print_classes("position", c.by_position, to)
        for t in c.worst:
            print(
                f"largest KLD: {t.kld:.3g} at window {t.window + 1}, position {t.position}"
                f" (nll {t.nll_base:.4f} in the base, {t.nll:.4f})",
                file=to,
            )
    print_verdict(c.decision.verdict, c.decision.reasons, to, words=VERDICTS_OF_FILES)


def _print_classes(what: str, found: Sequence[Class], to: TextIO) -> None:
    rows = [
        [
            x.name,
            str(x.tokens),
            str(x.changed) if x.tokens else "",
            f"{x.dnll:+.2e}" if x.tokens else "",
            f"{x.kld:.2e}" if x.tokens else "",
        ]
        for x in found
    ]
    print_table((what, "tokens", "top-1 changes", "mean nll difference", "mean KLD"), rows, to)
