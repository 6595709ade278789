"""A kernel nobody trusts on its bench: problems for it, calls of it, whether it is right, and its time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# Beyond this an element is another problem's: rounding to any type of 16 bits stays far below.
WRONG = 0.1
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
        # Lengths and a scale that go by position are given below.
        tensors = dict(zip("qkv", native[:3], strict=True))

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
