"""Who is told how a run of `verify ppl` goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from verify.arms.records import ModelRecord, TensorParallelRecord
from verify.model.runner import Progress
from verify.ppl.record import CorpusRecord


class Listener(Protocol):
    """What a console shows of a run while it goes on."""

    def notice(self, text: str) -> None:
        """Something that a reader must know."""

    def started(
        self,
        model: ModelRecord,
        corpus: CorpusRecord,
        shares: TensorParallelRecord | None,
        notes: Sequence[str],
    ) -> None:
        """All that can be refused is behind; `notes`: about the kernels."""

    def progress(self, first: int, last: int, windows: int) -> Progress:
        """Windows first .. last - 1 of all begin; what is returned is called as they go on."""
        ...

    def windows_done(self, first: int, running: list[float]) -> None:
        """Perplexity over all windows so far, after each of the windows from `first` on."""
