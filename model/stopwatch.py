"""Seconds by kind of work. On a GPU they are those of its default stream, and measuring waits for nothing."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

# Measurements that are kept before the device is asked for them.
_MOST_PENDING = 8192

Kind = TypeVar("Kind", bound=Hashable)


class Stopwatch(Generic[Kind]):
    """Seconds by kind (`products`, `weights`, ...), and operations of the products.

    Kinds nest: what an inner one takes is not counted in the outer.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flop = 0.0
        self._seconds: dict[Kind, float] = {}
        self._open: list[Kind] = []
        self._pending: list[tuple[Kind, Kind | None, torch.cuda.Event, torch.cuda.Event]] = []
        # Looking the stream up, and making an event, each take the host as long as a launch.
        self._stream = torch.cuda.default_stream(device) if device.type == "cuda" else None
        self._events: list[torch.cuda.Event] = []

    @property
    def seconds(self) -> dict[Kind, float]:
        """Seconds so far; waits for the device."""
        self._settle()
        return dict(self._seconds)

    def reset(self) -> None:
        self._settle()
        self._seconds.clear()
        self.flop = 0.0

    def restore(self, seconds: dict[Kind, float], flop: float) -> None:
        """Go on from what was measured before."""
        self.reset()
        self._seconds |= seconds
        self.flop = flop

    def add(self, kind: Kind, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self._add(kind, None, seconds)

    @contextmanager
    def time(self, kind: Kind) -> Iterator[None]:
        outer = self._open[-1] if self._open else None
        self._open.append(kind)
        if self._stream is not None:
            begin = self._event()
            begin.record(self._stream)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._open.pop()
            if self._stream is not None:
                end = self._event()
                end.record(self._stream)
                self._pending.append((kind, outer, begin, end))
                if len(self._pending) > _MOST_PENDING:
                    self._settle()
            else:
                self._add(kind, outer, time.perf_counter() - started)

    def _event(self) -> torch.cuda.Event:
        return self._events.pop() if self._events else torch.cuda.Event(enable_timing=True)

    def _settle(self) -> None:
        if self._pending:
            torch.cuda.synchronize(self.device)
            for kind, outer, begin, end in self._pending:
                self._add(kind, outer, begin.elapsed_time(end) / 1000)
                self._events += begin, end
            self._pending.clear()

    def _add(self, kind: Kind, outer: Kind | None, seconds: float) -> None:
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds
        if outer is not None:
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds
