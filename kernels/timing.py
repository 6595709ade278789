"""Timing on a CUDA device: what one call costs on the device, and how fast the device reads memory.

A call of a few microseconds is shorter than the host's work to launch it, so calls are captured in a CUDA
graph and the graph is replayed. The calls of a graph go round over several sets of inputs, which together
are larger than the level-2 cache: a call never finds its inputs there, as in generation, where every layer
has a cache of its own. Calls follow each other on one stream, so launch latencies and the drain of each call
are counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

# Input sets together are at least this many times the level-2 cache.
CACHE_MULTIPLE = 4
# Device time that one replay should take at least, and how many replays are timed.
REPLAY_US = 1000.0
REPLAYS = 21


class Timing(NamedTuple):
    """Microseconds a call: the median of the replays, and their smallest and largest."""

    median_us: float
    low_us: float
    high_us: float


def input_sets(bytes_a_call: int, device: torch.device | None = None) -> int:
    """How many sets of inputs exceed the level-2 cache CACHE_MULTIPLE times; at least 2."""
    cache = torch.cuda.get_device_properties(device or torch.cuda.current_device()).L2_cache_size
    return max(-(-CACHE_MULTIPLE * cache // max(bytes_a_call, 1)), 2)


def time_calls(calls: Sequence[Callable[[], object]], *, replays: int = REPLAYS) -> Timing:
    """Time of one call, from replays of a CUDA graph that goes round over `calls` (one an input set).

    calls: launch on the current stream without waiting for the device. Raises ValueError on none.
    """
    if not calls:
        raise ValueError("calls: expected at least one")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compile, choose algorithms, create handles
            for call in calls:
                call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream.synchronize()
        rounds = 1
        while True:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(rounds):
                    for call in calls:
                        call()
            graph.replay()
            times = []
            for _ in range(3 if rounds == 1 else replays):
                start.record(stream)
                graph.replay()
                end.record(stream)
                end.synchronize()
                times.append(start.elapsed_time(end) * 1000)
            middle = statistics.median(times)
            if rounds > 1 or middle >= REPLAY_US:
                if len(times) < replays:
                    for _ in range(replays - len(times)):
                        start.record(stream)
                        graph.replay()
                        end.record(stream)
                        end.synchronize()
                        times.append(start.elapsed_time(end) * 1000)
                break
            rounds = max(round(REPLAY_US / max(middle, 1e-3)), 2)
    torch.cuda.current_stream().wait_stream(stream)
    count = rounds * len(calls)
    return Timing(statistics.median(times) / count, min(times) / count, max(times) / count)


def read_bandwidth(gigabytes: float = 4.0) -> dict[str, float]:
    """GB/s of this device: `read` (a sum over a large tensor, bytes read), `copy` (bytes read plus written).

    `read` is the best of several ways to read, the ceiling for a kernel that reads a KV cache once.
    """
    x = torch.empty(int(gigabytes * 1e9) // 4, dtype=torch.float32, device="cuda").normal_()
    y = torch.empty_like(x)
    found = {"copy": 2 * x.nbytes / time_calls([lambda: y.copy_(x)]).median_us / 1e3}
    found |= {
        f"read_{name}": x.nbytes / time_calls([partial(way, x)]).median_us / 1e3
        for name, way in _WAYS_TO_READ.items()
    }
    found["read"] = max(value for name, value in found.items() if name.startswith("read_"))
    return found


def read_time(n_bytes: int, replays: int = REPLAYS) -> float:
    """Microseconds to read n_bytes that are not in the level-2 cache: the best of several ways, a call each.

    What `read_bandwidth` cannot say: a read of some megabytes ends before memory has reached full speed.
    """
    inputs = [
        torch.empty(n_bytes // 4, dtype=torch.float32, device="cuda").normal_()
        for _ in range(input_sets(n_bytes))
    ]
    times = [
        time_calls([partial(way, x) for x in inputs], replays=replays).median_us
        for way in _WAYS_TO_READ.values()
    ]
    return min(times)


def _sum_of_rows(x: torch.Tensor, width: int) -> torch.Tensor:
    return torch.sum(x[: x.numel() // width * width].view(-1, width), dim=1)


_WAYS_TO_READ: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": torch.sum,
    "max": torch.amax,
    "rows": lambda x: _sum_of_rows(x, 65_536),
    "short_rows": lambda x: _sum_of_rows(x, 16_384),
}
