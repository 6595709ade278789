"""Memory that was freed stays with the process, for the next tensor of the same size."""

from __future__ import annotations

import ctypes

# glibc's parameters (malloc.h), and values: larger blocks than this are given back when freed (32 MiB
# is the most that glibc takes); so much free memory at the end of the heap is kept.
_MMAP_THRESHOLD, _LARGEST_KEPT = -3, 32 << 20
_TRIM_THRESHOLD, _KEPT = -1, 256 << 20


def keep_freed_memory() -> bool:
    """Let glibc keep what was freed: whether it does. False with another C library.

    By default each tensor of more than 128 KiB is new memory, whose pages are made and filled with zeros when
    they are first written: a seventh of the time of `verify diff` on a CPU. No number depends on it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, _KEPT))
