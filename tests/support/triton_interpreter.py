"""Device code imported to be interpreted, and not compiled."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interpreted() -> Iterator[None]:
    """What is imported within it is run by Triton's interpreter. Triton must be installed."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language as tl

        # Torch may have imported Triton already, with its own library functions to be compiled: decorate
        # those anew. Triton compiles nothing else in this process.
        importlib.reload(tl.standard)
        for name in tl.__all__:
            if hasattr(tl.standard, name):
                setattr(tl, name, getattr(tl.standard, name))
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]
