"""The terminal, or what stands in its place: is there one, how wide, who still reads, and tables on it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
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
    """Whole, whatever the width: a figure that is cut is a wrong figure, a long line only an ugly one."""
    needed = _GAP * (len(table.columns) - 1)
    for column in table.columns:
        widest = max(len(line) for cell in (column.header, *column.cells) for line in str(cell).split("\n"))
        needed += widest if column.no_wrap else min(widest, max(column.min_width or 0, NARROWEST_WORDS))
    console.width = max(console.width, needed)
    console.print(table, crop=False)


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
