"""The progress bar of every command, on stderr: what is done, of how much, and in what time."""

from __future__ import annotations

import sys
import time
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


# Shorter runs are not foretold, nor before so many seconds.
LEAST_FORETOLD, LEAST_SEEN = 30.0, 2.0


class Foretelling:
    """How long a run over windows will take, said once, from what its first steps took: those of the first
    layer, as a rule, which are the run's own. Of kernels tried beforehand no more would be known, later. The
    first step of all counts as what is done once: libraries are asked in it, and plans made.

    clock: seconds, of any beginning; of: what the windows are of.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, of: str = "all") -> None:
        self.clock, self.of = clock, of
        self._begun: tuple[float, float] | None = None  # when, and how many windows were done then
        self._first: tuple[float, float] | None = None  # the same of the first step's end
        self._told = False

    def begins(self, done: float) -> None:
        """A group begins with so many windows behind it; the first is what is counted from."""
        self._begun = self._begun or (self.clock(), done)

    def said(self, done: float, windows: int) -> str | None:
        """`about 17 s a window, 12 minutes in all`, the first time that it can be told; else None."""
        if self._told or self._begun is None:
            return None
        now = self.clock()
        self._first = self._first or (now, done)
        seconds, share = now - self._first[0], done - self._first[1]
        if share <= 0 or seconds < LEAST_SEEN:
            return None
        self._told = True
        each = seconds / share
        whole = now - self._begun[0] + each * (windows - done)
        said = f"about {_span(each)} a window, {_span(whole)} in {self.of}"
        return said if whole >= LEAST_FORETOLD else None


def _span(seconds: float) -> str:
    """`17 s`, `3.4 minutes`, `12 minutes`, `1.5 hours`."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    if seconds < 600:
        return f"{seconds / 60:.2g} minutes"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
