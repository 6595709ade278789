"""Running a build's own llama-perplexity on the text-generation path, into a logits file.

`-b 1 -ub 1` feeds one token a call, which is how generation attends; the default batches never do. It changes
the matrix products too, in both builds alike. `-ub 4` is a call of speculative decoding.

What ends before the first window is begun (a refused option, a missing file, memory) says nothing about
attention; what ends after it does.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from verify.engines.builds import Program
from verify.engines.logits_file import LogitsFile
from verify.kernels.errors import MachineFailure
from verify.kernels.foreign.lifeline import FROM_OUTSIDE, signal_name, tied_process
from verify.machine.errors import UsageError

LAST_LINES = 12
# An engine that says more is stopped: a log is read, and kept.
MOST_LOG_BYTES = 1 << 28
_POLL_SECONDS = 0.1
# `[12]8.1234,`: what the program prints after each window.
_WINDOW_DONE = re.compile(rb"\[(\d+)\]\d")


# What it prints before the first one.
_WINDOWS_BEGIN = b"calculating perplexity over"
# An engine's own words for what is no fault of its attention.
_NOT_A_FAULT = re.compile(
    r"out of memory|OutOfMemory|failed to allocate|cannot allocate memory|bad_alloc", re.I
)
_TELLING = re.compile(r"error|invalid|failed|unknown|cannot|out of memory|assert|abort|not found", re.I)


class EngineRun(NamedTuple):
    """One build's run."""

    # A or B.
    name: str
    command: list[str]  # that was run
    logits: Path  # file that it should have written
    log: Path  # file of what it said
    seconds: float  # of the wall
    # Why there is no whole logits file, or None.
    failure: str | None
    # Its own last lines then, and the one among them that says most.
    last: list[str]
    told: str  # the line of it that says most
    # Whether the failure came before the first window, or is one of memory: no evidence about attention.
    before_windows: bool


class Batches(NamedTuple):
    """How many tokens an engine takes a call: n_q query tokens, or its own default where that is None."""

    n_q: int | None = 1

    @property
    def options(self) -> list[str]:
        return [] if self.n_q is None else ["-b", str(self.n_q), "-ub", str(self.n_q)]

    def __str__(self) -> str:
        if self.n_q is None:
            return "the prompt's path, hundreds of query tokens a call (the engine's own -b and -ub)"
        one = "one query token" if self.n_q == 1 else f"{self.n_q} query tokens"
        return f"{one} a call (-b {self.n_q} -ub {self.n_q})"


def engine_command(
    program: Program,
    *,
    model: str,
    text: str,
    n_ctx: int,
    chunks: int,
    logits: Path,
    batches: Batches,
    more: Sequence[str],
) -> list[str]:
    """The command line of one run."""
    return [
        *(*program.argv, "-m", model, "-f", text, "-c", str(n_ctx), "--chunks", str(chunks)),
        *(*batches.options, "--kl-divergence-base", str(logits), *more),
    ]


def run_engine(
    name: str,
    command: list[str],
    *,
    logits: Path,
    log: Path,
    time_limit: float,
    chunks: int,
    progress: Callable[[int, int], None] | None = None,
) -> EngineRun:
    """Run it to its end or the limit; its output goes to `log`. A failure is part of what is returned.

    An interrupt ends the program too, and passes through; so does whatever ends this process. Raises
    MachineFailure where somebody else, or the system, killed the program.
    """
    logits.unlink(missing_ok=True)
    started = time.monotonic()

    def ended(failure: str | None) -> EngineRun:
        last = last_lines(log) if failure else []
        return EngineRun(
            name=name,
            command=command,
            logits=logits,
            log=log,
            seconds=time.monotonic() - started,
            failure=failure,
            last=last,
            told=telling_line(last),
            before_windows=failure is not None and (not _began(log) or _memory_ran_out(last)),
        )

    try:
        with (
            log.open("wb") as output,
            tied_process(command, stdout=output, stderr=subprocess.STDOUT) as process,
        ):
            while process.poll() is None:
                if time.monotonic() - started > time_limit:
                    return ended(f"was stopped at the time limit of {time_limit:g} s")
                if log.stat().st_size > MOST_LOG_BYTES:
                    return ended(f"was stopped: its log has more than {MOST_LOG_BYTES} bytes")
                if progress:
                    progress(_windows_done(log), chunks)
                time.sleep(_POLL_SECONDS)
    except OSError as error:
        return ended(f"cannot be started: {error.strerror or error}")
    if -process.returncode in FROM_OUTSIDE:
        raise MachineFailure(
            f"{name}: {command[0]} was killed by {signal_name(-process.returncode)}, which it does not do to"
            f" itself; its log is {log}"
        )
    if process.returncode < 0:
        return ended(f"died of signal {signal_name(-process.returncode)}")
    if process.returncode:
        return ended(f"ended with exit code {process.returncode}")
    try:
        LogitsFile(logits).close()
    except UsageError as error:
        return ended(f"ended with exit code 0 and left no whole logits file: {error}")
    return ended(None)


def last_lines(log: Path, count: int = LAST_LINES) -> list[str]:
    """The last lines of a log that hold something, made printable."""
    with log.open("rb") as f:
        f.seek(max(log.stat().st_size - (1 << 16), 0))
        text = f.read().decode("utf-8", errors="replace")
    lines = ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in text.splitlines()]
    return [line for line in lines if line][-count:]


def telling_line(lines: Sequence[str]) -> str:
    """The line in which an engine says why it ended: the last that names an error, else the last."""
    return next(
        (x.strip() for x in reversed(lines) if _TELLING.search(x)), lines[-1].strip() if lines else ""
    )


def _began(log: Path) -> bool:
    """Whether the first window was begun."""
    text = log.read_bytes() if log.is_file() else b""
    return _WINDOWS_BEGIN in text or _WINDOW_DONE.search(text) is not None


def _memory_ran_out(lines: Sequence[str]) -> bool:
    return any(_NOT_A_FAULT.search(line) for line in lines)


def _windows_done(log: Path) -> int:
    with log.open("rb") as f:
        f.seek(max(log.stat().st_size - (1 << 14), 0))
        found = _WINDOW_DONE.findall(f.read())
    return int(found[-1]) if found else 0
