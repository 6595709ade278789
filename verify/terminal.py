"""The terminal, or the pipe in its place: is there one, how wide, and tables on it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Wide enough for our tables in a pipe, where there is no terminal to ask.
PIPE_WIDTH = 132


def on_terminal(stream: Any = None) -> bool:
    stream = sys.stderr if stream is None else stream
    return bool(getattr(stream, "isatty", lambda: False)())


def console_on(to: TextIO) -> Console:
    """For tables and lines of plain text: brackets in a path or specification are no markup."""
    from rich.console import Console

    return Console(file=to, width=None if on_terminal(to) else PIPE_WIDTH, highlight=False, markup=False)
