"""What a worker's process says beside its answers: a kernel's own prints, a library's last words."""

from __future__ import annotations

import os
import sys

from verify.kernels.said import one_line, visible

# Lines of one worker that are passed on to stderr; a library that aborts may write hundreds.
MOST_LINES = 40
# A line that is longer, or not ended, counts as one at this length.
_MOST_LINE = 4096
_MOST_SHOWN = 400
_PIECE = 1 << 16
# Of one `take`: a worker that never stops writing shall not keep us from looking at the clock.
_PIECES = 16


class Overheard:
    """Reads a pipe that does not block. first_line: the first since `forget`, made fit to be shown."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self._passed_on = 0
        self.first_line = ""

    def forget(self) -> None:
        self.first_line = ""

    def take(self) -> bool:
        """Read what is there; False once nothing more can come."""
        for _ in range(_PIECES):
            try:
                piece = os.read(self._fd, _PIECE)
            except BlockingIOError:
                return True
            if not piece:
                self._line(self._rest)
                self._rest = b""
                return False
            *lines, self._rest = (self._rest + piece).split(b"\n")
            for line in lines:
                self._line(line)
            if len(self._rest) > _MOST_LINE:
                self._line(self._rest)
                self._rest = b""
        return True

    def _line(self, raw: bytes) -> None:
        if not raw.strip():
            return
        line = raw[:_MOST_LINE].decode("utf-8", "replace")
        self.first_line = self.first_line or one_line(line, _MOST_SHOWN)
        if self._passed_on > MOST_LINES or sys.stderr is None:
            return
        self._passed_on += 1
        if self._passed_on > MOST_LINES:
            print(f"(what the kernel says beyond {MOST_LINES} lines is not shown)", file=sys.stderr)
        else:
            print(visible(line).rstrip()[:_MOST_SHOWN], file=sys.stderr)
