"""How this process stands in its system: its standard streams, and the signals that end it.

A run that is ended by SIGTERM or SIGHUP goes the way of Ctrl-C: what is finished is kept, workers and engines
end, and the exit code is 128 + the signal's number.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

# A library that swallows the interrupt, while it is imported say, does not keep the process longer than this.
GRACE_S = 60
# An interrupt inside a callback of the interpreter (of a weak reference, say) is lost there; it comes again.
_AGAIN_S = 0.05
_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def open_standard_streams() -> None:
    """Put the null device where stdin, stdout or stderr was closed: the next file opened would be it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w" if fd else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


class Ended:
    """Inside it SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does, the first of them; an ignored one
    (`nohup`) not.

    came: the number of the signal that came, 0 for none.
    """

    def __init__(self) -> None:
        self.came = 0
        self._before: dict[int, Any] = {}
        self._hook: Callable[[Any], object] | None = None
        self._again: threading.Timer | None = None

    def __enter__(self) -> Ended:
        if threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._keyboard)
            for number in _ENDING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._interrupt)
            self._before[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
            if signal.SIGINT in self._before:
                self._hook, sys.unraisablehook = sys.unraisablehook, self._lost
        return self

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            sys.unraisablehook = self._hook
        if self._again is not None:
            self._again.cancel()
        if self.came:
            signal.alarm(0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def code(self, interrupted: int) -> int:
        """The exit code of a run that was ended: 128 + the signal's number; `interrupted` where none came."""
        return 128 + self.came if self.came else interrupted

    def _lost(self, unraisable: Any) -> None:
        """Where nothing can be raised: an interrupt is sent again for when that is over."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            assert self._hook is not None
            self._hook(unraisable)
            return
        main = threading.main_thread().ident
        assert main is not None
        self._again = threading.Timer(_AGAIN_S, signal.pthread_kill, (main, signal.SIGINT))
        self._again.daemon = True
        self._again.start()

    def _keyboard(self, number: int, _frame: Any) -> None:
        # Every one of them: who types it again wants it sooner.
        self.came = self.came or number
        raise KeyboardInterrupt

    def _interrupt(self, number: int, _frame: Any) -> None:
        # Once: what ends the run in good order is not itself interrupted.
        for other in _ENDING:
            signal.signal(other, signal.SIG_IGN)
        self.came = number
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(GRACE_S)
        raise KeyboardInterrupt
