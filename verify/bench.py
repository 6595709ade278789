"""Decode time of kernels against n_kv, beside what the machine's memory can deliver.

One query token reads the whole KV cache once, so its time has a floor: bytes of K and V over the read
bandwidth, which is measured in the same run. On CUDA, calls are replayed from a graph over inputs that exceed
the level-2 cache; on a CPU, where nothing is claimed, they are timed one by one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch

from verify.arms.model_facts import check_lengths, check_shapes
from verify.kernels.call import Call, checked_call
from verify.kernels.kernel import Kernel
from verify.kernels.plans.shapes import ModelShape
from verify.kernels.registry import build_kernel
from verify.kernels.timing import input_sets, read_bandwidth, time_calls
from verify.kernels.trace import Launched, LaunchTrace
from verify.machine.environment import describe

CPU_CALLS = 5
CPU_READ_BYTES = 1 << 28
# A split pays where it is faster than the first kernel by more than this share of its time.
PAYS = 0.01


@dataclass(frozen=True)
class Measurement:
    """One kernel at one n_kv. Where it failed, figures are None."""

    shape: str  # of the layer
    n_kv: int  # visible keys
    spec: str  # of the kernel
    us: float | None  # microseconds a call, the median
    gb_s: float | None  # GB/s of K and V, each counted once
    share: float | None  # of the read bandwidth of the same run
    graph: bool  # calls were replayed from a CUDA graph
    launched: str  # in words
    notes: list[str]  # of the kernel
    failed: str | None = None  # why, if it did


def measure(
    shapes: Sequence[ModelShape], n_kvs: Sequence[int], specs: Sequence[str], device: torch.device
) -> tuple[dict[str, float], Iterator[Measurement]]:
    """The machine's bandwidth in GB/s, and the measurements one by one. Raises SpecError, UsageError."""
    # What cannot be built, or cut so, is refused before anything runs.
    check_shapes(specs, shapes, "decode")
    check_lengths(n_kvs, shapes, device)
    bandwidth = read_bandwidth() if device.type == "cuda" else _cpu_bandwidth()

    def each() -> Iterator[Measurement]:
        for shape in shapes:
            for n_kv in n_kvs:
                for spec in specs:
                    yield _measure_one(shape, n_kv, spec, device, bandwidth["read"])

    return bandwidth, each()


def crossovers(found: Sequence[Measurement]) -> list[dict[str, Any]]:
    """For each shape and kernel but the first: the n_kv from which it is faster than the first, or None.

    `from` a length means at that and every longer one that was measured.
    """
    first = found[0].spec if found else ""
    lines = []
    for shape, spec in dict.fromkeys((m.shape, m.spec) for m in found if m.spec != first):
        times = {m.n_kv: m.us for m in found if m.shape == shape and m.spec == spec}
        base = {m.n_kv: m.us for m in found if m.shape == shape and m.spec == first}
        pays_from = None
        for n_kv in sorted(times, reverse=True):
            mine, theirs = times[n_kv], base.get(n_kv)
            if mine is None or theirs is None or mine >= theirs * (1 - PAYS):
                break
            pays_from = n_kv
        ratios = {n: base[n] / t for n, t in times.items() if t and base.get(n)}  # type: ignore[operator]
        lines.append(
            {"shape": shape, "spec": spec, "against": first, "pays_from": pays_from, "speedup": ratios}
        )
    return lines


class BenchListener(Protocol):
    """Who is told how the measurements go on."""

    def begins(self, machine: str, read_gb_s: float) -> None:
        """The name of the device, and its read bandwidth in GB/s."""

    def measured(self, one: Measurement) -> None:
        """One of them is done."""


class BenchResult(NamedTuple):
    """All measurements, beside the machine's bandwidth in GB/s."""

    environment: dict[str, Any]
    bandwidth_gb_s: dict[str, float]
    measurements: list[Measurement]
    crossovers: list[dict[str, Any]]  # see `crossovers`

    def to_json(self) -> dict[str, Any]:
        measured = [asdict(m) for m in self.measurements]
        return {"schema": 1, "command": "bench", **self._asdict(), "measurements": measured}


def measure_all(
    shapes: Sequence[ModelShape],
    n_kvs: Sequence[int],
    specs: Sequence[str],
    device: torch.device,
    listener: BenchListener,
) -> BenchResult:
    """Every kernel at every shape and length. Raises SpecError, UsageError."""
    bandwidth, each = measure(shapes, n_kvs, specs, device)
    cpu = describe("cpu")["cpu"]
    listener.begins(torch.cuda.get_device_name(device) if device.type == "cuda" else cpu, bandwidth["read"])
    found = []
    for one in each:
        found.append(one)
        listener.measured(one)
    return BenchResult(describe(str(device)), bandwidth, found, crossovers(found))


def _measure_one(
    shape: ModelShape, n_kv: int, spec: str, device: torch.device, read_gb_s: float
) -> Measurement:
    kernel = build_kernel(spec)
    size = shape.cache_bytes(n_kv)
    try:
        us, graph, launched = _time(kernel, shape, n_kv, device)
    except Exception as error:
        # What one kernel cannot do is a line of the table; the others are still measured.
        said = " ".join(str(error).split())[:160]
        return Measurement(
            shape=str(shape),
            n_kv=n_kv,
            spec=spec,
            us=None,
            gb_s=None,
            share=None,
            graph=False,
            launched="",
            notes=kernel.notes,
            failed=f"{type(error).__name__}: {said}",
        )
    finally:
        kernel.close()
    rate = size / us / 1e3
    lines = LaunchTrace([launched]).coverage()
    kinds = {(line.kernel, line.head_groups, line.parts, line.launch) for line in lines}
    said = "; ".join(
        f"{name}, heads {'+'.join(map(str, groups)) or 'not known'}, KV parts {parts or 'not known'}, {how}"
        for name, groups, parts, how in sorted(kinds)
    )
    return Measurement(
        shape=str(shape),
        n_kv=n_kv,
        spec=spec,
        us=us,
        gb_s=rate,
        share=rate / read_gb_s,
        graph=graph,
        launched=said,
        notes=list(kernel.notes),
    )


def _time(kernel: Kernel, shape: ModelShape, n_kv: int, device: torch.device) -> tuple[float, bool, Launched]:
    """Microseconds a call, whether it was replayed from a CUDA graph, and what it launches."""
    if device.type != "cuda":
        ready = kernel.ready(_call(shape, n_kv, device, 0))
        return _time_one_by_one(ready.launch, lambda: None), False, ready.launched
    sets = input_sets(shape.cache_bytes(n_kv), device)
    calls = [kernel.ready(_call(shape, n_kv, device, i)) for i in range(sets)]
    launched = calls[0].launched
    try:
        return time_calls([call.launch for call in calls]).median_us, True, launched
    except RuntimeError:
        # A kernel that waits for the device in the middle of a call cannot be captured.
        torch.cuda.synchronize()
        return _time_one_by_one(calls[0].launch, torch.cuda.synchronize), False, launched


def _time_one_by_one(launch: Callable[[], object], wait: Callable[[], None]) -> float:
    launch()
    times = []
    for _ in range(CPU_CALLS):
        wait()
        started = time.perf_counter()
        launch()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def _call(shape: ModelShape, n_kv: int, device: torch.device, seed: int) -> Call:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, heads: int, size: int) -> torch.Tensor:
        return torch.randn(1, rows, heads, size, generator=generator, device=device, dtype=torch.float16)

    k = draw(n_kv, shape.kv_heads, shape.k_size)
    v = k[..., : shape.v_size] if shape.v_in_k else draw(n_kv, shape.kv_heads, shape.v_size)
    return checked_call(
        draw(1, shape.q_heads, shape.k_size),
        k,
        v,
        kv_len=torch.full((1, 1), n_kv, dtype=torch.int32, device=device),
        scale=shape.k_size**-0.5,
    )


def _cpu_bandwidth() -> dict[str, float]:
    x = torch.ones(CPU_READ_BYTES // 4)
    return {"read": x.nbytes / _time_one_by_one(lambda: x.sum(), lambda: None) / 1e3}
