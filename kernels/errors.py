"""What can go wrong with a kernel: a specification nobody can read, or a kernel that fails while it runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpecError(ValueError):
    """A kernel specification that cannot be built: one line that names the text and what was expected."""


class KernelFailure(RuntimeError):
    """A kernel that raised, hung, died, or returned something other than attention.

    It is a finding about the kernel under test (`broken`), never an error of the tool. `kind` is one of
    `raised`, `hung`, `died`, `shape`, `dtype`, `device`, `wrote-inputs`, or `unsupported` where the call asks
    for something that the kernel does not take.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def nearest(word: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the known word closest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {matches[0]!r}?" if matches else ""
