"""One run of a kernel: whatever goes wrong in it is a finding about the kernel and not an error here."""

from __future__ import annotations

from typing import NamedTuple

import torch

from verify.kernels.call import Call, Result
from verify.kernels.errors import KernelFailure, MachineFailure
from verify.kernels.kernel import Kernel
from verify.kernels.said import one_line
from verify.kernels.trace import NOTHING, Launched
from verify.machine.devices import is_out_of_memory


class Attempt(NamedTuple):
    """output, or None and the failure in words. unsupported: the kernel does not take what the call asks for
    (sinks, say), which is no evidence either way; no_memory: it failed since the device was full, which a
    smaller call may not."""

    output: Result | None
    failure: str
    unsupported: bool
    no_memory: bool = False

    @property
    def launched(self) -> Launched:
        """What it launched; of a kernel that failed that is not known."""
        return NOTHING if self.output is None else self.output.launched

    def check_memory(self, spec: str) -> None:
        """Raises torch.cuda.OutOfMemoryError if that is why it failed: no finding where calls can shrink."""
        if self.no_memory:
            raise torch.cuda.OutOfMemoryError(f"{spec}: {self.failure}")


def attempt(kernel: Kernel, call: Call) -> Attempt:
    """Run a kernel once. Raises MachineFailure, which is no finding about the kernel."""
    output, failure, unsupported, no_memory = None, "", False, False
    try:
        output = kernel.run(call)
    except KernelFailure as failed:
        failure, unsupported = one_line(f"{failed.kind}: {failed}"), failed.kind == "unsupported"
    except MachineFailure:
        raise
    except Exception as raised:
        if is_out_of_memory(raised) and not isinstance(raised, torch.cuda.OutOfMemoryError):
            raise MachineFailure(f"{kernel.spec}: too little memory: {raised}", memory=True) from None
        failure = one_line(f"raised: {type(raised).__name__}: {raised}")
        no_memory = isinstance(raised, torch.cuda.OutOfMemoryError)
    return Attempt(output, failure, unsupported, no_memory)
