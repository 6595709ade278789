"""Tables and progress of commands that print plain text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from verify.machine.terminal import console_on, on_terminal, print_table_on


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], to: TextIO, *, words: int = 1) -> None:
    """Columns of text; the first `words` are to the left, the others are figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < words else "right", no_wrap=i >= words, overflow="fold")
    for row in rows:
        table.add_row(*row)
    print_table_on(console_on(to), table)


@contextmanager
def progress_of(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr that takes (done, total); None where stderr is no terminal."""
    if not on_terminal(sys.stderr):
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
