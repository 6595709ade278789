"""Where the time of a run goes: seconds by stage and length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from verify.model.stopwatch import Stopwatch


class StageClock:
    """Seconds of each stage, by n_kv: a stopwatch whose kinds are both. Stages do not overlap."""

    def __init__(self, device: torch.device) -> None:
        self._stopwatch: Stopwatch[tuple[str, int]] = Stopwatch(device)

    @property
    def seconds(self) -> dict[str, dict[int, float]]:
        """Seconds so far, by stage and n_kv; waits for the device."""
        found: dict[str, dict[int, float]] = {}
        for (name, n_kv), seconds in self._stopwatch.seconds.items():
            found.setdefault(name, {})[n_kv] = seconds
        return found

    def by_stage(self) -> dict[tuple[str, int], float]:
        """Seconds so far, by stage and n_kv as one key."""
        return self._stopwatch.seconds

    def by_stage_since(self, before: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
        """The same since `by_stage` said `before`."""
        return {kind: seconds - before.get(kind, 0.0) for kind, seconds in self.by_stage().items()}

    def add(self, seconds: dict[tuple[str, int], float]) -> None:
        """Count what another process took too."""
        for (name, n_kv), more in seconds.items():
            self._stopwatch.add((name, n_kv), more)

    @contextmanager
    def stage(self, name: str, n_kv: int) -> Iterator[None]:
        """Counts what runs inside as this stage."""
        with self._stopwatch.time((name, n_kv)):
            yield

    def to_json(self) -> dict[str, dict[str, float]]:
        """Seconds by stage and n_kv, and by stage in all."""
        return {
            name: {"all": round(sum(by.values()), 3), **{str(n): round(s, 3) for n, s in by.items()}}
            for name, by in self.seconds.items()
        }

    def __str__(self) -> str:
        """One line, the longest stage first."""
        totals = {name: sum(by.values()) for name, by in self.seconds.items()}
        named = [f"{name} {total:.1f}" for name, total in sorted(totals.items(), key=lambda x: -x[1])]
        return f"{sum(totals.values()):.1f} s: {', '.join(named)}"
