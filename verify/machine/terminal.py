"""The terminal, or what stands in its place: is there one, how wide, who still reads, and tables on it."""

from __future__ import annotations

import io
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Takes what is done, and all there is to do.
Progress = Callable[[int, int], None]
# Wide enough for our tables in a pipe, where there is no terminal to ask.
PIPE_WIDTH = 132
# Words of a table are folded to this many letters a line where a terminal is narrow.
NARROWEST_WORDS = 12
# Between two columns.
_GAP = 2


def on_terminal(stream: Any = None) -> bool:
    stream = sys.stderr if stream is None else stream
    return bool(getattr(stream, "isatty", lambda: False)())


def console_on(to: TextIO) -> Console:
    """For tables and lines of plain text: brackets in a path or specification are no markup."""
    from rich.console import Console

    return Console(file=to, width=None if on_terminal(to) else PIPE_WIDTH, highlight=False, markup=False)


def print_table_on(console: Console, table: Table) -> None:
    """Whole, whatever the width: a figure that is cut is a wrong figure. Where a terminal has too little room
    for the table's lines, a row is a few lines: its first cell, then each column's name and what is there.
    """
    needed = _GAP * (len(table.columns) - 1)
    for column in table.columns:
        widest = max(len(line) for cell in (column.header, *column.cells) for line in str(cell).split("\n"))
        needed += widest if column.no_wrap else min(widest, max(column.min_width or 0, NARROWEST_WORDS))
    if needed > console.width and on_terminal(console.file):
        for line in _folded(table, console.width):
            console.print(line, soft_wrap=True)
        return
    console.width = max(console.width, needed)
    console.print(table, crop=False)


def _folded(table: Table, width: int) -> Iterator[str]:
    """Rows of a table that is too wide, each as lines of at most `width` letters where its words allow."""
    names = [str(column.header) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        first, *rest = map(str, row)
        yield first or "-"
        told = [f"{name} {value}" for name, value in zip(names[1:], rest, strict=True) if value]
        yield from wrapped("  " + "; ".join(told), width)


def wrapped(text: str, width: int) -> list[str]:
    """A line in pieces of at most `width` letters, no word cut; later ones stand two letters further in."""
    inside = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.wrap(
        text,
        width,
        subsequent_indent=inside,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    ) or [""]


def say(*lines: str, to: TextIO) -> None:
    """Lines of plain text: wrapped at blanks on a terminal, whole in a pipe."""
    width = console_on(to).width if on_terminal(to) else 0
    for line in lines:
        print(*(wrapped(line, width) if width else [line]), sep="\n", file=to)
    to.flush()


def counted(n: int, noun: str) -> str:
    """`1 window`, `2 windows`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


class _Outlasting(io.FileIO):
    """A file descriptor whose reader may leave: what is written then goes nowhere.

    failed: what else kept something from being written, a full disk say.
    """

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.failed = error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def outlast_readers() -> None:
    """From now on a closed pipe (`| head -1`) ends no run: its results lie in a folder.

    Text that the terminal's encoding lacks is written with backslashes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.flush()
        raw = _Outlasting(stream.fileno(), "w", closefd=False)
        patient = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering or name == "stderr",
        )
        setattr(sys, name, patient)


def unwritten() -> OSError | None:
    """Why some of what was printed is not there, if that is no reader's doing."""
    buffer = getattr(sys.stdout, "buffer", None)
    if buffer is None:
        return None
    sys.stdout.flush()
    return getattr(buffer.raw, "failed", None)
