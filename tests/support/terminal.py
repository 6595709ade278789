"""A person's terminal: `verify` in a pseudo-terminal of 80 columns and 24 rows, and what stands on it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

COLUMNS, ROWS = 80, 24
# Control sequences that a bar, colours and boxes are made with.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]")
_ERASE = re.compile(r"\x1b\[[0-9;?]*[JKA]")


class Shown(NamedTuple):
    """lines: all that was printed, without what a bar wrote over; returncode: of the program."""

    lines: list[str]
    returncode: int

    @property
    def screen(self) -> str:
        """What a person sees at the end without scrolling: the last rows, less one for the prompt."""
        return "\n".join(self.lines[-(ROWS - 1) :])

    @property
    def too_long(self) -> list[str]:
        """Lines that the terminal would cut, wherever a word is."""
        return [line for line in self.lines if len(line) > COLUMNS]


def on_a_terminal(
    *arguments: str, folder: Path, interrupt: Callable[[str], bool] | None = None, seconds: float = 120
) -> Shown:
    """Run `verify ARGUMENTS` in the folder. interrupt: told of all output so far; True sends Ctrl-C, once."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    gone = ("COLUMNS", "LINES", "NO_COLOR", "CI")
    environment = {name: value for name, value in os.environ.items() if name not in gone}
    process = subprocess.Popen(
        [sys.executable, "-m", "verify", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=folder,
        env=environment | {"TERM": "xterm"},
        start_new_session=True,
        # Ctrl-C reaches whoever has the terminal.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
    )
    os.close(follower)
    raw, deadline, asked = b"", time.monotonic() + seconds, False
    while time.monotonic() < deadline:
        if not select.select([leader], [], [], 0.2)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            piece = os.read(leader, 1 << 16)
        except OSError:  # the last writer has gone
            break
        if not piece:
            break
        raw += piece
        if interrupt is not None and not asked and interrupt(raw.decode(errors="replace")):
            asked = True
            os.write(leader, b"\x03")
    else:
        process.kill()
    code = process.wait()
    os.close(leader)
    return Shown(lines_of(raw.decode(errors="replace")), code)


def lines_of(text: str) -> list[str]:
    """Printed lines; what was erased or written over is gone.

    >>> lines_of("bar 1/2\\r\\x1b[2Kdone\\r\\n")
    ['done']
    """
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        # A line that is begun anew after it was erased is what stands there.
        last = _ERASE.split(line)[-1] if _ERASE.search(line) else line
        lines.append(_CONTROL.sub("", last.split("\r")[-1]).rstrip())
    return lines[:-1] if lines and not lines[-1] else lines
