"""Cheats that only a GPU shows: graphs and streams."""

from __future__ import annotations

import torch

from .bench import Bench, outputs


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
