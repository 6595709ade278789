"""What `verify ppl --only` prints while it runs, and at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verify.kernels.said import visible
from verify.machine.errors import UsageError
from verify.machine.terminal import console_on, counted, print_table_on
from verify.ppl.only import OnlyPass
from verify.ppl.perplexity import final_line, perplexity
from verify.ppl.runfolder import PAGE
from verify.reports.only_page import closing_table, only_csv, only_markdown
from verify.reports.ppl_screen import PplConsole
from verify.reports.tables import Column, table_of


class OnlyTerminal(PplConsole):
    """Results to `out`, progress and notices to stderr. csv, md: files for the closing table."""

    def __init__(self, *, json: bool = False, csv: Path | None = None, md: Path | None = None) -> None:
        super().__init__(json=json)
        self._tables = (("--csv", csv, only_csv), ("--md", md, only_markdown))

    def begins(self, one: OnlyPass, number: int, passes: int) -> None:
        self.stop()
        which = f"{number} of {passes}: " if passes > 1 else ""
        windows = one.windows
        print(
            f"{which}model {visible(Path(one.model.path).name)}, text {visible(one.text.name)}:"
            f" {windows.n_tokens_total} tokens, {counted(windows.n_windows, 'window')} of {windows.n_ctx},"
            f" {windows.scored_per_window} scored in each",
            file=self.out,
            flush=True,
        )
        self.begin_bar("all" if passes == 1 else f"all of {number} of {passes}")

    def ended(self, passes: Sequence[OnlyPass], rows: Sequence[Mapping[str, Any]]) -> None:
        """A closing line a pass; of several passes a table."""
        self.stop()
        for one, row in zip(passes, rows, strict=True):
            found = perplexity(one.scored.ravel())
            print(final_line(found, n_ctx=row["n_ctx"], windows=row["windows"]), file=self.out)
        if len(rows) > 1:
            columns, texts, words = closing_table(rows)
            kinds = [Column(name, "words" if name in words else "figure") for name in columns]
            print_table_on(console_on(self.out), table_of(kinds, texts))

    def tables_and_report(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """The closing table into files, and where the report lies. Raises UsageError."""
        for option, path, text in self._tables:
            if path is None:
                continue
            try:
                path.write_text(text(rows), encoding="utf-8")
            except OSError as error:
                raise UsageError(f"{option} {path}: cannot be written: {error.strerror or error}") from None
            print(f"table: {visible(str(path))}", file=self.out)
        print(f"report: {visible(str(folder / PAGE))}", file=self.out, flush=True)
