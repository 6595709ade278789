"""Process groups that do not outlive us, and descriptors that a child can be given.

A life line is a pipe that nobody writes into. Its reading end is inherited by the children; the writing end
is ours alone, and closes when we end, in whatever way. Linux then sends SIGKILL to the children's whole
group, by itself, whatever they are doing.
"""

from __future__ import annotations

import fcntl
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

# A group that was sent SIGKILL is gone within this; one in a system call that never returns is left.
GONE_LIMIT_S = 5.0
# A program does not send itself these: somebody else, or the system, ended it.
FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGXCPU}


def above_standard(fd: int) -> int:
    """The descriptor, or a copy of it above 2 with the original closed.

    A process that was started without stdin gets 0 for the next file that it opens; a child's own standard
    streams would be put over it.
    """
    if fd > 2:
        return fd
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(fd)
    return copy


def pipe() -> tuple[int, int]:
    """As `os.pipe`, both ends above 2. Raises OSError."""
    reads, writes = os.pipe()
    return above_standard(reads), above_standard(writes)


class LifeLine:
    """One group's: `reads` is for the child to inherit (`pass_fds`), `hold` once it runs, `close` at its end.

    Raises OSError where no pipe can be had.
    """

    def __init__(self) -> None:
        self.reads, self._writes = pipe()

    def hold(self, group: int) -> None:
        """Tie a process group to us. Where the system has no such signals, a child must watch by itself."""
        if hasattr(fcntl, "F_SETSIG"):
            fcntl.fcntl(self.reads, fcntl.F_SETOWN, -group)
            fcntl.fcntl(self.reads, fcntl.F_SETSIG, signal.SIGKILL)
            flags = fcntl.fcntl(self.reads, fcntl.F_GETFL)
            fcntl.fcntl(self.reads, fcntl.F_SETFL, flags | os.O_ASYNC)
        os.close(self.reads)
        self.reads = -1

    def close(self) -> None:
        """Let go of it: what is still tied to it ends."""
        for fd in (self.reads, self._writes):
            if fd >= 0:
                os.close(fd)
        self.reads = self._writes = -1


@contextmanager
def tied_process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program that leads a group of its own, which ends with the block and with us. Raises OSError."""
    with closing(LifeLine()) as life:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=(life.reads,), start_new_session=True, **options
        )
        try:
            life.hold(process.pid)
            yield process
        finally:
            end_group(process)


def output_of(process: subprocess.Popen[bytes], limit_s: float, most: int) -> bytes:
    """What a process writes to its pipe until it ends, or has written this much.

    Raises subprocess.TimeoutExpired.
    """
    assert process.stdout is not None
    found, deadline = bytearray(), time.monotonic() + limit_s
    with process.stdout as pipe, selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(found) < most:
            if not selector.select(max(deadline - time.monotonic(), 0.0)):
                raise subprocess.TimeoutExpired(process.args, limit_s)
            if not (piece := os.read(pipe.fileno(), most - len(found))):
                process.wait(max(deadline - time.monotonic(), 0.0))
                break
            found += piece
    return bytes(found)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group of its own, and all that it started. Nothing where they have ended.

    The leader may have ended already: its children have its group still.
    """
    # Not waited for yet, its number is still its own, and so is its group's.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GONE_LIMIT_S)


def signal_name(number: int) -> str:
    """`SIGSEGV`; of a real-time one `signal 40`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
