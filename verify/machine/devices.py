"""The device that a command runs on."""

from __future__ import annotations

import torch

from verify.kernels.errors import KernelFailure, MachineFailure
from verify.machine import environment
from verify.machine.errors import UsageError

# How torch and C++ say it.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "bad allocation")


def default_device() -> str:
    """cuda where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen_device(name: str) -> torch.device:
    """Raises UsageError for a device that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch sees no CUDA device here (verify doctor says more)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return environment.available_memory()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; torch has a class of its own for that on a GPU alone."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    if isinstance(error, MachineFailure):
        return error.memory
    if not isinstance(error, RuntimeError) or isinstance(error, KernelFailure):
        return False
    return any(words in str(error) for words in _NO_MEMORY)
