"""What holds for every test of how runs end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def signals_reach_what_is_started() -> Iterator[None]:
    """Tests under `nohup` have SIGHUP ignored, those in a shell's background SIGINT; what they start inherits
    that, and no handler."""
    here = threading.current_thread() is threading.main_thread()
    ignored = [n for n in (signal.SIGHUP, signal.SIGINT) if here and signal.getsignal(n) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, lambda *_: None)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
