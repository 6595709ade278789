"""What is written down about a fault and about a clean variant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from verify.kernels.kernel import Kernel


class Fault(NamedTuple):
    """A known bug. name; what: one sentence; references: issues or pull requests where it was seen, or
    `emulated`; plan: the plan it lives in; build; needs: `cuda` if it exists only on a GPU."""

    name: str
    what: str
    references: tuple[str, ...]
    plan: str
    build: Callable[[], Kernel]
    needs: Literal["", "cuda"] = ""


class Variant(NamedTuple):
    """A correct kernel that rounds in its own way. name; what: one sentence; build; without: families of
    inputs that it is not made for (an accumulator in float16 cannot hold sums near 65504)."""

    name: str
    what: str
    build: Callable[[], Kernel]
    without: tuple[str, ...] = ()
