"""The progress bar of every command, on stderr: what is done, of how much, and in what time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from verify.machine.terminal import Progress as Step
from verify.machine.terminal import on_terminal


def progress_bar() -> Progress:
    """A bar without tasks, not yet started; `disable` is set where stderr is no terminal, and none shows."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not on_terminal(sys.stderr),
    )


@contextmanager
def progress_of(what: str) -> Iterator[Step | None]:
    """A bar with one task; None where stderr is no terminal."""
    with progress_bar() as bar:
        if bar.disable:
            yield None
            return
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def telling(what: str) -> Iterator[Callable[[str], None]]:
    """What is being done, in words; a line each where stderr is no terminal."""
    console = Console(stderr=True)
    with console.status(what) as status:

        def tell(text: str) -> None:
            if console.is_terminal:
                status.update(escape(text))
            else:
                print(f"  {text}", file=sys.stderr, flush=True)

        yield tell
