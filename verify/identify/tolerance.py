"""How large the error of a right kernel may be: the number to write into someone's test.

A draw is one query token of one call, all its heads. For each family of inputs, of the kernel's own errors:

    at most     what the budget allows: no right kernel of this arithmetic is above it
    99.9 %      exp(mean + 3.09 sd) of ln error over draws: one draw in a thousand of right kernels is above

NMSE is sum (out - exact)^2 / sum exact^2, relative its root, absolute the largest |out - exact|; the cosine
of out and exact is at least sqrt(1 - relative^2). Beside it, what the gates of others let pass: the smallest
common factor that each still sees, by halving, and whether it sees the last key dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, NamedTuple

import torch

from verify.identify.learning import learn
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import error_budget
from verify.kernels.call import Call
from verify.kernels.exact import exact_attention
from verify.kernels.heads import Heads
from verify.kernels.identify.reading import LEAST_KEYS
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.gates import GATES, compared, plain_attention, verdicts
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.kernel import Kernel
from verify.kernels.plans.shapes import shape_named
from verify.machine.errors import UsageError

CONFIDENCE = 0.999
# Query tokens a call; their number times the seeds is the number of draws.
ROWS, SEEDS = 16, 4
# Common factors from 2^-20 to 1/2, by halving on a logarithmic scale.
_LEAST, _MOST, _STEPS = -20.0, -1.0, 8


@dataclass(frozen=True)
class FamilyTolerance:
    """What a right kernel reaches on one family of inputs."""

    family: str  # of inputs
    draws: int  # that it rests on
    nmse: float  # at 99.9 % of draws
    nmse_most: float  # that the budget allows; infinite where it says nothing
    absolute: float  # at 99.9 %
    absolute_most: float  # that the budget allows
    typical: float  # the median NMSE
    factors: dict[str, float | None]  # gate -> the smallest common factor that it sees; None: not even 1/2
    dropped: dict[str, bool]  # gate -> whether it sees the last key dropped
    refuses: list[str]  # gates that refuse the right result itself

    @property
    def relative(self) -> float:
        return math.sqrt(self.nmse)

    @property
    def cosine(self) -> float:
        """At least, at 99.9 %."""
        return math.sqrt(max(1 - self.nmse, 0.0))

    def to_json(self) -> dict[str, Any]:
        more = {"relative": self.relative, "relative_most": math.sqrt(self.nmse_most), "cosine": self.cosine}
        return {**vars(self), **more}


def tolerances(
    kernel: Kernel,
    heads: Heads,
    n_kv: int,
    families: Sequence[str],
    *,
    device: str = "cpu",
    seeds: int = SEEDS,
    first_seed: int = 0,
) -> list[FamilyTolerance]:
    """Of a kernel that is taken to be right, and of its arithmetic, on calls that it takes."""
    unknown = [name for name in families if name not in FAMILIES]
    if unknown:
        raise UsageError(f"--inputs {unknown[0]}: expected any of {', '.join(FAMILIES)}")
    sizes = InputSizes(n_kv=(n_kv,) * ROWS, heads=heads, edges=())
    found = []
    for family in families:
        calls = [draw(family, sizes, first_seed + i, device=device) for i in range(seeds)]
        if kernel.capabilities().refuses(calls[0]) is None:
            found.append(_of_family(kernel, family, calls))
    return found


class Tolerances(NamedTuple):
    """How large the errors of a right kernel are, a family of inputs each."""

    spec: str  # of the kernel that is taken to be right
    shape: str  # query heads / KV heads x head size, or a name
    n_kv: int  # keys of every row
    families: list[FamilyTolerance]
    notes: list[str]  # what a reader must know besides

    def of(self, family: str) -> FamilyTolerance:
        """The figures of one family. Raises KeyError for one that was not drawn."""
        for each in self.families:
            if each.family == family:
                return each
        raise KeyError(family)

    def to_json(self) -> dict[str, Any]:
        """As docs/json-of-commands.md lists it; its schema is `verify/schemas/tolerance.json`."""
        return {
            "schema": 1,
            "command": "tolerance",
            "exit_code": 0,
            "spec": self.spec,
            "shape": self.shape,
            "n_kv": self.n_kv,
            "families": [each.to_json() for each in self.families],
            "notes": self.notes,
        }


def tolerances_of(
    kernel: Kernel, shape: str, n_kv: int, families: Sequence[str], *, seeds: int = SEEDS, device: str = "cpu"
) -> Tolerances:
    """What `verify tolerance` is asked for. Raises UsageError, SpecError."""
    if n_kv < LEAST_KEYS:
        raise UsageError(f"--n-kv {n_kv}: expected at least {LEAST_KEYS}")
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: expected at least 1")
    named = shape_named(shape)
    if named.v_in_k:
        raise UsageError(f"--shape {shape}: values lie in the keys there: not done")
    said = learn(kernel, [named.heads], [n_kv], path="decode", dtype=torch.float16, device=device)
    found = tolerances(kernel, named.heads, n_kv, families, device=device, seeds=seeds)
    return Tolerances(kernel.spec, shape, n_kv, found, [*said, *kernel.notes])


def _of_family(kernel: Kernel, family: str, calls: Sequence[Call]) -> FamilyTolerance:
    nmses, largest = [], []
    nmse_most = absolute_most = 0.0
    for call in calls:
        out = kernel.run(call).out.double()
        arithmetic: Arithmetic = kernel.arithmetic_of(call)
        budget = error_budget(call, arithmetic)
        error, power = out - budget.out, budget.out.square().sum((0, 2, 3)).clamp(min=1e-300)
        nmses.append(error.square().sum((0, 2, 3)) / power)
        largest.append(error.abs().amax((0, 2, 3)))
        vacuous = bool(budget.vacuous.any())
        of_budget = (budget.bound.square().sum((0, 2, 3)) / power).max()
        nmse_most = max(nmse_most, math.inf if vacuous else float(of_budget))
        absolute_most = max(absolute_most, math.inf if vacuous else float(budget.bound.max()))
    every = torch.cat(nmses)
    call = calls[0]
    exact, plain = exact_attention(call).out, plain_attention(call)
    out = kernel.run(call).out.double()
    shorter = replace(call, kv_len=(call.kv_len - 1).clamp(min=1))
    without_last = out + exact_attention(shorter).out - exact
    return FamilyTolerance(
        family=family,
        draws=every.numel(),
        nmse=min(_quantile(every), nmse_most),
        nmse_most=nmse_most,
        absolute=min(_quantile(torch.cat(largest)), absolute_most),
        absolute_most=absolute_most,
        typical=float(every.median()),
        factors=_smallest_factors(call, out, exact, plain),
        dropped={name: not ok for name, ok in verdicts(compared(call, without_last, exact, plain)).items()},
        refuses=[name for name, ok in verdicts(compared(call, out, exact, plain)).items() if not ok],
    )


def _quantile(errors: torch.Tensor) -> float:
    """What one draw in a thousand exceeds, of errors whose logarithms are normal."""
    positive = errors[errors > 0]
    if positive.numel() < 2:
        return float(errors.max())
    logs = torch.log(positive)
    return math.exp(float(logs.mean()) + NormalDist().inv_cdf(CONFIDENCE) * float(logs.std()))


def _smallest_factors(
    call: Call, out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor
) -> dict[str, float | None]:
    """The smallest factor 1 + f on a right result that each gate refuses."""

    def sees(gate: str, exponent: float) -> bool:
        return not verdicts(compared(call, out * (1 + 2.0**exponent), exact, plain))[gate]

    found: dict[str, float | None] = {}
    for gate in GATES:
        if not sees(gate.name, _MOST):
            found[gate.name] = None
            continue
        low, high = _LEAST, _MOST
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if sees(gate.name, middle) else (middle, high)
        found[gate.name] = 2.0**high
    return found
