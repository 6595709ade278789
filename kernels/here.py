"""What can run on this machine: a CUDA device, Triton, other libraries. Told without loading any of them."""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata, util

# Our name of a library, the module that is imported, the distribution that it comes in.
LIBRARIES = {
    "flashinfer": ("flashinfer", "flashinfer-python"),
    "flash_attn": ("flash_attn", "flash-attn"),
    "xformers": ("xformers", "xformers"),
}
NO_CUDA = "no CUDA device"


def has_cuda() -> bool:
    """Whether torch can use a CUDA device. torch, which takes a second to load, is asked only if it may."""
    return ("torch" in sys.modules or _may_have_cuda()) and _ask_torch()


def why_not_flash() -> str | None:
    """Why our CUDA kernel cannot run here, or None if it can."""
    if not has_cuda():
        return NO_CUDA
    return None if util.find_spec("triton") else "Triton is not installed"


def why_not_library(name: str) -> str | None:
    """Why the kernel of one of `LIBRARIES` cannot run here, or None if it can."""
    module, distribution = LIBRARIES[name]
    if util.find_spec(module) is None:
        return f"{distribution} is not installed"
    return None if has_cuda() else NO_CUDA


def why_not_installed(name: str) -> str | None:
    """Why a library that needs no GPU by itself cannot be used here, or None if it can."""
    return None if util.find_spec(name) is not None else f"{name} is not installed"


def _ask_torch() -> bool:
    import torch

    return torch.cuda.is_available()


def _may_have_cuda() -> bool:
    """False where torch is built for CPUs, or NVIDIA's driver is not there to be loaded."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return True
    if version.endswith("+cpu"):
        return False
    if sys.platform == "linux" and "rocm" not in version:
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return False
    return True
