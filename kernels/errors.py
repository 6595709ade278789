"""What can go wrong with a kernel: a specification nobody can read, or a kernel that fails while it runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from verify.kernels.said import one_line


class SpecError(ValueError):
    """A kernel specification that cannot be built: one line that names the text and what was expected."""


class KernelFailure(RuntimeError):
    """A kernel that raised, hung, died, or returned something other than attention.

    It is a finding about the kernel under test (`broken`), never an error of the tool. `kind` is one of
    `raised`, `hung`, `died`, `shape`, `dtype`, `device`, `wrote-inputs`, or `unsupported` where the call asks
    for something that the kernel does not take.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(one_line(message))
        self.kind = kind


class MachineFailure(RuntimeError):
    """The machine failed a kernel: no memory, no room, no process, or it was killed from outside.

    Never a finding about the kernel: it ends the measurement, and nobody is to blame for it. memory: whether
    a smaller call may do. Derived from no class that stands for a kernel's fault.
    """

    def __init__(self, message: str, *, memory: bool = False) -> None:
        super().__init__(one_line(message))
        self.memory = memory


def nearest(word: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the known word closest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {matches[0]!r}?" if matches else ""
