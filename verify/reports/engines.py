"""What `verify engines` prints while two builds run, and of what they leave."""

from __future__ import annotations

from contextlib import AbstractContextManager

from verify.machine.terminal import Progress
from verify.reports.kld import KldScreen
from verify.reports.progress import progress_of


class EnginesScreen(KldScreen):
    """A line about each build, a bar while it runs; then as of any two logits files."""

    def say(self, text: str) -> None:
        print(text, file=self.to, flush=True)

    def running(self, what: str) -> AbstractContextManager[Progress | None]:
        return progress_of(what)
