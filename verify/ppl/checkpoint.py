"""A long group between two of its layers: what a run that is cut off there goes on from.

Hidden states of every arm, and all that was seen in the layers before. States that are one tensor are written
once, and are one tensor again when they are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from verify.machine.errors import UsageError
from verify.model.logits import State


class Checkpoint(NamedTuple):
    """windows: of the group; layers: how many are done; hidden: states that the next one takes; evidence: of
    the layers done, as `verify.ppl.groups` has it."""

    windows: range
    layers: int
    hidden: dict[State, torch.Tensor]
    evidence: dict[str, Any]


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Raises OSError."""
    windows = checkpoint.windows
    try:
        torch.save({**checkpoint._asdict(), "windows": [windows.start, windows.stop]}, path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(" ".join(str(error).split())) from None


def read_checkpoint(file: IO[bytes], device: torch.device) -> Checkpoint:
    """Raises whatever reading something else does."""
    found = torch.load(file, map_location=device, weights_only=True)
    return Checkpoint(**{**found, "windows": range(*found["windows"])})


class Checkpoints:
    """How often a group is kept, and where.

    save: writes one; a UsageError of it is said once by `notice`, and none is written any more: the run
    itself goes on. seconds: between two.
    """

    def __init__(
        self, save: Callable[[Checkpoint], None], *, seconds: float, notice: Callable[[str], None]
    ) -> None:
        self._save, self._seconds, self._notice = save, seconds, notice
        self._last = time.monotonic()
        self._works = True

    @property
    def due(self) -> bool:
        return self._works and time.monotonic() - self._last >= self._seconds

    def keep(self, checkpoint: Checkpoint) -> None:
        try:
            self._save(checkpoint)
        except UsageError as error:
            self._works = False
            self._notice(f"{error}; no layers of this group are kept")
        self._last = time.monotonic()
