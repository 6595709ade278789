"""Checks of kernels that nobody trusts: ways to look right without being it, each with a name.

They run in the kernel's own process, beside it, and so import torch and the standard library alone; what
torch was before the kernel's file was loaded is kept. A kernel that knows these checks can evade them: they
find what models and contests have produced, and are no proof.
"""

from __future__ import annotations

import builtins
import gc
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# Beyond this an element is another problem's: rounding to any type of 16 bits stays far below.
WRONG = 0.1
# Seconds that a kernel has to write after it returned.
PATIENCE = 0.25
REPLAYS = 11
# Relative errors (root mean square) beyond what a type of results leaves: coarser than it says it is.
COARSEST = {torch.float32: 2.0**-15, torch.float64: 2.0**-15, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
# Filled with this, memory that nobody wrote shows.
POISON = math.nan
# Logits whose few largest keys hold the weight: other values then are another result.
SHARP = 3.0
# Timed calls, and those before them that warm up.
TIMED, WARM = 20, 3
_clock = time.perf_counter


class Given(NamedTuple):
    """One call in the kernel's own order of dimensions: what it is given, and how its result is read."""

    tensors: dict[str, torch.Tensor]
    words: dict[str, Any]
    # Reads what it returned as [B, T, Hq, Dv].
    read: Callable[[Any], torch.Tensor]
    # [B, T, Hq, Dv] float64 of the contents of `tensors` now.
    due: Callable[[], torch.Tensor]


class Bench:
    """A kernel, problems for it, and what torch was before it was loaded.

    make: a problem of this seed, in fresh memory; before: `snapshot()` of then; reference: the result of
    somebody else's kernel that lies in memory, where there is one.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        make: Callable[[int], Given],
        before: dict[str, Any],
        reference: Callable[[Given], Any] | None = None,
    ) -> None:
        self.function, self.make, self.before, self.reference = function, make, before, reference
        self.cuda = make(0).tensors["q"].is_cuda

    def call(self, problem: Given) -> Any:
        """What the kernel returns; free memory is poisoned first."""
        poison_free_memory(problem.tensors["q"])
        with torch.no_grad():
            t = problem.tensors
            found = self.function(t["q"], t["k"], t["v"], **problem.words)
        self.wait()
        return found

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def is_right(self, problem: Given, found: Any) -> bool:
        return is_near(problem.read(found), problem.due())


def is_near(out: torch.Tensor, due: torch.Tensor) -> bool:
    error = (out.double() - due).abs()
    return bool(torch.isfinite(error).all()) and float(error.max()) <= WRONG * max(
        float(due.abs().max()), 0.1
    )


def poison_free_memory(like: torch.Tensor) -> None:
    """Blocks of the sizes that a result may have are filled and given back: who returns memory that it did
    not write returns this."""
    held = []
    for factor in (1, 2):
        for dtype in (like.dtype, torch.float32):
            held += [
                torch.full((like.numel() * factor,), POISON, dtype=dtype, device=like.device) for _ in "abc"
            ]
    del held


def outputs(found: Any) -> list[torch.Tensor]:
    several = found if isinstance(found, (tuple, list)) else [found]
    return [x for x in several if isinstance(x, torch.Tensor)]


def places(tensors: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors if x.numel()}


# The checks. Each says what it caught, or nothing.


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


def zeros(bench: Bench) -> str | None:
    """The result is zero, or the same whatever the values are."""
    first, second = bench.make(3), bench.make(4)
    a, b = (p.read(bench.call(p)).clone() for p in (first, second))
    if not bool(a.any()) and bool(first.due().any()):
        return "its result is zero everywhere"
    if torch.equal(a, b):
        return "its result does not depend on what it is given"
    return None


def remembered_by_pointer(bench: Bench) -> str | None:
    """The same memory with other contents gives the old result."""
    problem, other, fresh = bench.make(5), bench.make(6), bench.make(6)
    first = problem.read(bench.call(problem)).clone()
    for name, x in other.tensors.items():
        problem.tensors[name].copy_(x)
    second = problem.read(bench.call(problem)).clone()
    if is_near(second, problem.due()):
        return None
    if torch.equal(second, first):
        return "other contents in the same memory give the old result: it is remembered by pointer"
    right = bench.is_right(fresh, bench.call(fresh))
    return "other contents in the same memory give a wrong result" if right else None


def remembered_by_shape(bench: Bench) -> str | None:
    """Other inputs of the same shape give the old result."""
    kept = [bench.make(seed) for seed in (7, 8)]
    first, second = (p.read(bench.call(p)).clone() for p in kept)
    if torch.equal(first, second) and not is_near(second, kept[1].due()):
        return "other inputs of the same shape give the old result: it is remembered by shape"
    return None


def remembered_by_seed(bench: Bench) -> str | None:
    """The result depends on torch's seed, or is right for one seed alone."""
    state = torch.get_rng_state()
    try:
        for seed in (0, 42, 1234):
            problem = bench.make(9 + seed)
            torch.manual_seed(987654321)
            without = problem.read(bench.call(problem)).clone()
            torch.manual_seed(seed)
            found = problem.read(bench.call(problem))
            if not is_near(found, problem.due()) and not is_near(found, without.double()):
                return f"after torch.manual_seed({seed}) its result is not that of its inputs"
    finally:
        torch.set_rng_state(state)
    return None


def remembered_by_value(bench: Bench) -> str | None:
    """Inputs that differ in a few places, and not in their ends or sums, give the old result."""
    problem, again = bench.make(10), bench.make(10)
    first = problem.read(bench.call(problem)).clone()
    # Two stretches of the values change places: ends of memory and sums stay.
    flat = again.tensors["v"].view(-1)
    middle, length = flat.numel() // 2, flat.numel() // 8
    a, b = slice(length, 2 * length), slice(middle + length, middle + 2 * length)
    kept = flat[a].clone()
    flat[a] = flat[b]
    flat[b] = kept
    second = again.read(bench.call(again))
    if torch.equal(second, first) and not is_near(second, again.due()):
        return "inputs whose ends and sums are the same give the old result: it is remembered by value"
    return None


def replays(bench: Bench) -> str | None:
    """Of eleven calls one is wrong that another time is right."""
    for i in range(REPLAYS):
        problem = bench.make(20 + i)
        if not bench.is_right(problem, bench.call(problem)):
            if any(bench.is_right(problem, bench.call(problem)) for _ in range(3)):
                return f"call {i + 1} of {REPLAYS} is wrong, and right when it is asked again"
            return None
    same = bench.make(40)
    first = same.read(bench.call(same)).clone().double()
    for i in range(1, REPLAYS):
        if not is_near(same.read(bench.call(same)), first):
            return f"the same call gives another result the {i + 1}. time"
    return None


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


def downcast(bench: Bench) -> str | None:
    """The result is coarser than its type, and its inputs', can be."""
    squares = [0.0, 0.0]
    for seed in (57, 58):
        problem = bench.make(seed)
        due, out = problem.due(), problem.read(bench.call(problem)).double()
        squares[0] += float((out - due).square().sum())
        squares[1] += float(due.square().sum())
    error = math.sqrt(squares[0] / max(squares[1], 1e-300))
    stated = problem.tensors["q"].dtype
    if not error > COARSEST[stated]:
        # NaN is another check's.
        return None
    name = str(stated).removeprefix("torch.")
    return (
        f"inputs are {name}, and its relative error is {error:.1e}, as of numbers of"
        f" {max(round(-math.log2(error)) - 1, 1)} bits: it computes in a narrower type"
    )


def torch_patched(bench: Bench) -> str | None:
    """Functions of torch, timers or builtins are replaced."""
    now = snapshot()["functions"]
    changed = sorted(name for name, x in bench.before["functions"].items() if now.get(name) is not x)
    return f"it replaces {', '.join(changed[:4])}" if changed else None


def globals_changed(bench: Bench) -> str | None:
    """Settings of torch or of the process are changed."""
    bench.call(bench.make(59))
    now = snapshot()["settings"]
    changed = sorted(name for name, x in bench.before["settings"].items() if now[name] != x)
    return f"it changes {', '.join(changed)}" if changed else None


def random_state(bench: Bench) -> str | None:
    """torch's random numbers are set."""
    torch.manual_seed(987654321)
    bench.call(bench.make(60))
    return None if torch.initial_seed() == 987654321 else "it sets torch's seed"


def reads_the_stack(bench: Bench) -> str | None:
    """It looks for results in the callers' frames or among all objects."""
    import sys

    seen: list[str] = []
    kept = {(sys, "_getframe"): sys._getframe, (gc, "get_objects"): gc.get_objects,
            (gc, "get_referrers"): gc.get_referrers}  # fmt: skip

    frame_of = sys._getframe

    def told(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any) -> Any:
            caller: Any = frame_of(1)
            file = str(caller.f_globals.get("__name__", ""))
            if file.split(".")[0] not in ("torch", "triton", "inspect", "logging", "warnings", "collections",
                                          "typing", "functools", "contextlib", "importlib"):  # fmt: skip
                seen.append(name)
            return function(*args)

        return inner

    for (module, name), function in kept.items():
        setattr(module, name, told(f"{module.__name__}.{name}", function))
    try:
        bench.call(bench.make(61))
    finally:
        for (module, name), function in kept.items():
            setattr(module, name, function)
    return f"it calls {seen[0]}: it may look for results outside its arguments" if seen else None


def cuda_graph(bench: Bench) -> str | None:
    """A captured graph, replayed with other contents, gives another result than the call."""
    problem, other = bench.make(62), bench.make(63)
    t = problem.tensors
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(3):
                bench.function(t["q"], t["k"], t["v"], **problem.words)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph), torch.no_grad():
            found = bench.function(t["q"], t["k"], t["v"], **problem.words)
    except RuntimeError:
        # Not every right kernel can be captured.
        return None
    for name, x in other.tensors.items():
        t[name].copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    right = bench.is_right(problem, found)
    return None if right else "a captured graph, replayed with other contents, gives a wrong result"


def two_streams(bench: Bench) -> str | None:
    """On a stream of its own the result is not complete when that stream is."""
    problem, t = bench.make(64), None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    t = problem.tensors
    with torch.cuda.stream(stream), torch.no_grad():
        found = bench.function(t["q"], t["k"], t["v"], **problem.words)
        at_once = [x.clone() for x in outputs(found)]
        stream.synchronize()
    torch.cuda.synchronize()
    same = all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(at_once, outputs(found), strict=True)
    )
    if not same or not bench.is_right(problem, found):
        return "on another stream its result is not complete when that stream is: it computes elsewhere"
    return None


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


def snapshot() -> dict[str, Any]:
    """What a kernel must leave as it is: functions by name, and settings."""
    functions: dict[str, Any] = {}
    for space in (
        torch, torch.nn.functional, torch.Tensor, torch.cuda, torch.testing, torch.linalg, torch.nn.Module,
        torch.cuda.Event, time, builtins,
    ):  # fmt: skip
        for name, x in list(vars(space).items()):
            if callable(x) and not name.startswith("__"):
                functions[f"{space.__name__}.{name}"] = x
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        precision = ""
    settings = {
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "float32 matmul precision": precision,
        "cuDNN's TF32": torch.backends.cudnn.allow_tf32,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "number of threads": torch.get_num_threads(),
        "default device": str(torch.get_default_device()),
        "environment variables": {
            n: x for n, x in os.environ.items() if not n.startswith(("TORCH", "TRITON"))
        },
        "current folder": os.getcwd(),  # noqa: PTH109
    }
    return {"functions": functions, "settings": settings}


def timed(bench: Bench) -> list[float]:
    """Seconds of calls on fresh, poisoned inputs each, by a clock that was kept before the kernel came."""
    seconds = []
    for i in range(WARM + TIMED):
        problem = bench.make(100 + i)
        t = problem.tensors
        bench.wait()
        began = _clock()
        with torch.no_grad():
            found = bench.function(t["q"], t["k"], t["v"], **problem.words)
        bench.wait()
        took = _clock() - began
        if i >= WARM:
            seconds.append(took)
        if not bench.is_right(problem, found):
            return []
    return seconds


def bench_of(
    form: Any,
    exact: Callable[..., torch.Tensor],
    before: dict[str, Any],
    *,
    reference: Any = None,
    sizes: Sequence[int],
    dtype: str,
    device: str,
) -> Bench:
    """A bench for a form (of `forms`). exact: `forms.plain_softmax`; reference: the form of a kernel that it
    stands beside; sizes: sequences, rows, keys, query heads, KV heads, head size."""
    batch, rows, keys, heads, kv_heads, size = sizes
    if form.one_head_each:
        kv_heads = heads
    if form.way == "square":
        rows = keys
    if form.layout == "thd":
        batch = 1
    kind = getattr(torch, (form.dtypes or (dtype,))[0])
    lengths = torch.full((rows,), keys)
    if form.way in ("causal", "square"):
        lengths = torch.arange(keys - rows + 1, keys + 1)
    elif form.way in ("kv_len", "mask"):
        lengths = lengths - torch.arange(rows).flip(0) % max(keys // 4, 1)
    kv_len = lengths.to(torch.int32).expand(batch, -1).contiguous().to(device)
    expected = [batch, rows, heads, size]

    def make(seed: int) -> Given:
        # Not torch's own stream of numbers: whoever sets or knows it learns nothing.
        g = torch.Generator().manual_seed(0x5EED + seed)
        shapes = ((rows, heads), (keys, kv_heads), (keys, kv_heads))
        drawn = [torch.randn(batch, n, h, size, generator=g) for n, h in shapes]
        q, k, v = (x.mul(SHARP if i == 0 else 1).to(kind).to(device) for i, x in enumerate(drawn))
        # Lengths are the kernel's to spoil as well.
        native, words = form.native(q, k, v, kv_len=kv_len.clone(), scale=size**-0.5)
        tensors = dict(zip("qkv", native, strict=True))

        def due() -> torch.Tensor:
            return exact(*(form.canonical(tensors[name]) for name in "qkv"), kv_len)

        def read(found: Any) -> torch.Tensor:
            out: torch.Tensor = form.result(found, expected, q.device)[0]
            return out

        return Given(tensors, words, read, due)

    def theirs(problem: Given) -> Any:
        t = problem.tensors
        return reference.function(t["q"], t["k"], t["v"], **problem.words)

    function = form.function
    if form.by_position:

        def function(q: Any, k: Any, v: Any, **words: Any) -> Any:
            return form.function(q, k, v, kv_len, size**-0.5, **words)

    return Bench(function, make, before, theirs if reference is not None else None)
