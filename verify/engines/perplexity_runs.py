"""Running a build's own llama-perplexity on the text-generation path, into a logits file.

`-b 1 -ub 1` feeds one token a call, which is how generation attends; the default batches never do. It changes
the matrix products too, in both builds alike.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from verify.engines.logits_file import LogitsFile
from verify.machine.errors import UsageError

PROGRAM_NAMES = ("llama-perplexity", "perplexity", "llama-perplexity.exe")
PROGRAM_FOLDERS = ("", "bin", "build/bin", "build")
ONE_TOKEN_A_CALL = ("-b", "1", "-ub", "1")
LAST_LINES = 12
_POLL_SECONDS = 0.1
# `[12]8.1234,`: what the program prints after each window.
_WINDOW_DONE = re.compile(rb"\[(\d+)\]\d")


class EngineRun(NamedTuple):
    """One build's run. failure: why there is no whole logits file, or None; last: its own last lines then."""

    name: str
    command: list[str]
    logits: Path
    log: Path
    seconds: float
    failure: str | None
    last: list[str]


def find_program(build: str) -> Path:
    """The llama-perplexity of a build: the program itself, or a folder with it (bin/, build/bin/).

    Raises UsageError.
    """
    path = Path(build)
    if path.is_dir():
        for folder in PROGRAM_FOLDERS:
            for name in PROGRAM_NAMES:
                if (path / folder / name).is_file():
                    return _executable(path / folder / name)
        raise UsageError(f"{build}: no {PROGRAM_NAMES[0]} there, nor in its bin/ or build/bin/")
    if not path.is_file():
        raise UsageError(f"{build}: no such file or folder, expected a build's folder or llama-perplexity")
    return _executable(path)


def _executable(path: Path) -> Path:
    if not os.access(path, os.X_OK):
        raise UsageError(f"{path}: cannot be run: it is not executable")
    return path.resolve()


def engine_command(
    program: Path, *, model: str, text: str, n_ctx: int, chunks: int, logits: Path, more: Sequence[str]
) -> list[str]:
    """The command line of one run."""
    return [
        *(str(program), "-m", model, "-f", text, "-c", str(n_ctx), "--chunks", str(chunks)),
        *(*ONE_TOKEN_A_CALL, "--kl-divergence-base", str(logits), *more),
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

    An interrupt ends the program too, and passes through.
    """
    logits.unlink(missing_ok=True)
    started = time.monotonic()

    def ended(failure: str | None) -> EngineRun:
        last = last_lines(log) if failure else []
        return EngineRun(name, command, logits, log, time.monotonic() - started, failure, last)

    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return ended(f"cannot be started: {error.strerror or error}")
        try:
            while process.poll() is None:
                if time.monotonic() - started > time_limit:
                    return ended(f"was stopped at the time limit of {time_limit:g} s")
                if progress:
                    progress(_windows_done(log), chunks)
                time.sleep(_POLL_SECONDS)
        finally:
            _end(process)
    if process.returncode < 0:
        return ended(f"died of signal {signal.Signals(-process.returncode).name}")
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


def _windows_done(log: Path) -> int:
    with log.open("rb") as f:
        f.seek(max(log.stat().st_size - (1 << 14), 0))
        found = _WINDOW_DONE.findall(f.read())
    return int(found[-1]) if found else 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program and what it started; nothing where it has ended."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
