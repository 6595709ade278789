"""One run of a kernel: whatever goes wrong in it is a finding about the kernel and not an error here."""

from __future__ import annotations

from typing import NamedTuple

import torch

from verify.kernels.call import AttentionOutput, Call
from verify.kernels.errors import KernelFailure, MachineFailure
from verify.kernels.kernel import Kernel
from verify.kernels.said import one_line
from verify.kernels.trace import LaunchTrace


class Attempt(NamedTuple):
    """output, or None and the failure in words. unsupported: the kernel does not take what the call asks for
    (sinks, say), which is no evidence either way; trace: what it launched; no_memory: it failed since the
    device was full, which a smaller call may not."""

    output: AttentionOutput | None
    failure: str
    unsupported: bool
    trace: LaunchTrace
    no_memory: bool = False

    def check_memory(self, spec: str) -> None:
        """Raises torch.cuda.OutOfMemoryError if that is why it failed: no finding where calls can shrink."""
        if self.no_memory:
            raise torch.cuda.OutOfMemoryError(f"{spec}: {self.failure}")


def attempt(kernel: Kernel, call: Call) -> Attempt:
    """Run a kernel once. Its own trace stays as it was: who counts the launches adds the attempt's.

    Raises MachineFailure, which is no finding about the kernel.
    """
    with untraced(kernel) as traced:
        output, failure, unsupported, no_memory = None, "", False, False
        try:
            output = traced.run(call)
        except KernelFailure as failed:
            failure, unsupported = one_line(f"{failed.kind}: {failed}"), failed.kind == "unsupported"
        except MachineFailure:
            raise
        except Exception as raised:
            failure = one_line(f"raised: {type(raised).__name__}: {raised}")
            no_memory = isinstance(raised, torch.cuda.OutOfMemoryError)
        return Attempt(output, failure, unsupported, traced.trace, no_memory)


class untraced:
    """A kernel whose launches are not counted as coverage of the run: for checks beside it."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __enter__(self) -> Kernel:
        self.kept, self.kernel.trace = self.kernel.trace, LaunchTrace()
        return self.kernel

    def __exit__(self, *_: object) -> None:
        self.kernel.trace = self.kept
