"""Where the time of a run goes: seconds by stage and length."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageClock:
    """Seconds of each stage, by n_kv. A GPU's queue is emptied at both ends of a stage, so that work counts
    where it was asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, dict[int, float]] = {}

    @contextmanager
    def stage(self, name: str, n_kv: int) -> Iterator[None]:
        """Counts what runs inside as this stage. Stages do not overlap."""
        began = self._now()
        try:
            yield
        finally:
            of_stage = self.seconds.setdefault(name, {})
            of_stage[n_kv] = of_stage.get(n_kv, 0.0) + self._now() - began

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

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
