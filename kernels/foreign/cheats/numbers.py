"""Cheats with numbers: nothing computed, or computed in fewer bits than are stated."""

from __future__ import annotations

import math

import torch

from .bench import Bench

# Relative errors (root mean square) beyond what a type of results leaves: coarser than it says it is.
COARSEST = {torch.float32: 2.0**-15, torch.float64: 2.0**-15, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def zeros(bench: Bench) -> str | None:
    """The result is zero, or the same whatever the values are."""
    first, second = bench.make(3), bench.make(4)
    a, b = (p.read(bench.call(p)).clone() for p in (first, second))
    if not bool(a.any()) and bool(first.due().any()):
        return "its result is zero everywhere"
    if torch.equal(a, b):
        return "its result does not depend on what it is given"
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
