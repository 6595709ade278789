"""`flash`: our flash-attention kernel on CUDA; `eager` where it cannot run, and then it says so."""

from __future__ import annotations

from kernels.eager import EagerKernel, EagerOptions

FALLBACK_NOTE = "the CUDA kernel did not run: `flash` ran as `eager`, the same arithmetic in plain torch"


def why_not_cuda() -> str | None:
    """The reason why the CUDA kernel cannot run here, or None if it can."""
    return "this version has no CUDA kernel yet"


def flash_kernel(spec: str, options: EagerOptions) -> EagerKernel:
    """The kernel that runs for `flash` here, with a note where it is not the CUDA one."""
    kernel = EagerKernel(spec, options)
    kernel.notes.append(f"{FALLBACK_NOTE} ({why_not_cuda()})")
    return kernel
