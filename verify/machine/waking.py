"""Waking a GPU: its driver makes a context, which takes half a second and needs no torch."""

from __future__ import annotations

import ctypes
import os
from threading import Thread

from verify.kernels.here import may_have_cuda

# What `torchrun` and its like set in processes that take another device than the first.
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def wake_gpu(device: str | None) -> Thread | None:
    """Have the first CUDA device's context made in a thread, while torch is imported; torch takes it over.

    device: as `--device` has it, None for the default. None for what may run elsewhere: on a CPU, on another
    device, in one of several ranks.
    """
    if device not in (None, "cuda", "cuda:0") or any(name in os.environ for name in _OF_RANKS):
        return None
    thread = Thread(target=_make_context, daemon=True)
    thread.start()
    return thread


def _make_context() -> None:
    """What fails here fails again when torch asks, and is told then."""
    if not may_have_cuda():
        return
    # As torch has it: a kernel's code is loaded when it is launched.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    context = ctypes.c_void_p()
    if driver.cuInit(0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
