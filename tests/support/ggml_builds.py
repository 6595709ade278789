"""Two real builds of ggml, from wheels on PyPI that carry its libraries unmodified."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

# Distribution, and the file of it that exports ggml's functions or is linked to those that do.
WHEELS = {"A": ("pywhispercpp", "libggml.so"), "B": ("xllamacpp", "xllamacpp/xllamacpp.abi3.so")}


def ggml_library(name: str) -> Path:
    """The library of build A or B; skips the test where its wheel is not installed."""
    distribution, file = WHEELS[name]
    try:
        found = Path(str(metadata.distribution(distribution).locate_file(file)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"the wheel {distribution} is not installed (`make test` installs it)")
    if not found.is_file():
        pytest.skip(f"the wheel {distribution} has no {file} on this platform")
    return found
