"""Checks of kernels that nobody trusts: ways to look right without being it, each with a name.

They run in the kernel's own process, beside it, and so import torch and the standard library alone; what
torch was before the kernel's file was loaded is kept. A kernel that knows these checks can evade them: they
find what models and contests have produced, and are no proof.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .bench import Bench, bench_of, timed
from .memory import (
    late_writes,
    output_aliases_input,
    reference_storage,
    result_overwritten,
    unwritten_memory,
    writes_inputs,
)
from .numbers import downcast, zeros
from .remembered import (
    remembered_by_pointer,
    remembered_by_seed,
    remembered_by_shape,
    remembered_by_value,
    replays,
)
from .streams import cuda_graph, two_streams
from .surroundings import globals_changed, random_state, reads_the_stack, snapshot, torch_patched

__all__ = ["CHEATS", "Bench", "Cheat", "bench_of", "snapshot", "timed"]


class Cheat(NamedTuple):
    """One check. what: a sentence of what it catches; cuda: it needs a GPU."""

    check: Callable[[Bench], str | None]
    what: str
    cuda: bool = False


# In the order in which they run: what is changed by being loaded first, what counts calls last.
CHEATS: dict[str, Cheat] = {
    function.__name__.replace("_", "-"): Cheat(function, (function.__doc__ or "").strip(), cuda)
    for function, cuda in (
        (torch_patched, False), (zeros, False), (output_aliases_input, False), (writes_inputs, False),
        (remembered_by_pointer, False), (remembered_by_shape, False), (remembered_by_seed, False),
        (remembered_by_value, False), (result_overwritten, False), (late_writes, False),
        (unwritten_memory, False), (reference_storage, False), (reads_the_stack, False),
        (downcast, False), (globals_changed, False), (random_state, False), (replays, False),
        (cuda_graph, True), (two_streams, True),
    )
}  # fmt: skip
