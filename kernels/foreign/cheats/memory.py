"""Cheats with memory: whose a result is, who wrote it, and when."""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any

import torch

from .bench import Bench, outputs, places, poison_free_memory

# Seconds that a kernel has to write after it returned.
PATIENCE = 0.25


def output_aliases_input(bench: Bench) -> str | None:
    """The result lies in the memory of an input."""
    problem = bench.make(1)
    shared = places(outputs(bench.call(problem))) & places(problem.tensors.values())
    return "its result lies in the memory of an input" if shared else None


def writes_inputs(bench: Bench) -> str | None:
    """Inputs are changed by the call."""
    problem = bench.make(2)
    before = {name: x.clone() for name, x in problem.tensors.items()}
    bench.call(problem)
    changed = [name for name, x in problem.tensors.items() if not torch.equal(x, before[name])]
    return f"it writes into {', '.join(changed)}" if changed else None


def result_overwritten(bench: Bench) -> str | None:
    """A later call writes over the result of an earlier one."""
    first, second = bench.make(50), bench.make(51)
    found = bench.call(first)
    kept = first.read(found).clone()
    bench.call(second)
    return None if torch.equal(first.read(found), kept) else "a later call writes over an earlier result"


def late_writes(bench: Bench) -> str | None:
    """The result, or an input, changes after the call returned."""
    problem = bench.make(52)
    before_threads = threading.active_count()
    poison_free_memory(problem.tensors["q"])
    with torch.no_grad():
        t = problem.tensors
        found = bench.function(t["q"], t["k"], t["v"], **problem.words)
    if bench.cuda:
        # What was launched on this stream may be on its way; other streams are not waited for.
        torch.cuda.current_stream().synchronize()
    at_once = problem.read(found).clone()
    given = {name: x.clone() for name, x in t.items()}
    time.sleep(PATIENCE)
    bench.wait()
    if not torch.equal(problem.read(found).nan_to_num(7.0), at_once.nan_to_num(7.0)):
        return "its result changes after it has returned"
    changed = [name for name, x in t.items() if not torch.equal(x, given[name])]
    if changed:
        return f"it writes into {', '.join(changed)} after it has returned"
    if threading.active_count() > before_threads:
        return "it leaves a thread running"
    return None


def unwritten_memory(bench: Bench) -> str | None:
    """Memory that it did not write is returned."""
    problem = bench.make(53)
    # Whatever is allocated and not written holds NaN then: torch has that for debugging.
    memory: Any = torch.utils.deterministic
    mode, fills = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.set_deterministic_debug_mode("warn")
        try:
            out = problem.read(bench.call(problem))
            unwritten = bool(torch.isnan(out).any())
        finally:
            torch.set_deterministic_debug_mode(mode)
            memory.fill_uninitialized_memory = fills
    if not unwritten:
        return None
    written = bench.make(53)
    if bool(torch.isnan(written.read(bench.call(written))).all()):
        # NaN everywhere and always is another fault.
        return None
    return "it returns memory that it did not write"


def reference_storage(bench: Bench) -> str | None:
    """The memory of the reference's result is returned."""
    if bench.reference is None:
        return None
    problem = bench.make(55)
    with torch.no_grad():
        theirs = bench.reference(problem)
    found = bench.call(problem)
    if places(outputs(found)) & places(outputs(theirs)):
        return "its result lies in the memory of the reference's result"
    return None
