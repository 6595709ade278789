"""One cell of the kernel diff report: two kernels on the same inputs, against the oracle and their budgets.

A cell is a shape, a length, a family of inputs and a seed. Cells are judged together, a line of the report
or all of them, by the rules of `verdict`: faults first, then coverage by the launch traces, then the paired
ratio of the two kernels' root mean square errors to float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from verify.arms.attempt import attempt
from verify.judge.statistics import DistanceRatio, ratio_of_samples
from verify.judge.verdict import Decision, PairEvidence, decide
from verify.kernels.bits import same_bits
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import Budget, error_budgets
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.exact import exact_attention
from verify.kernels.judging.detectors import SUSPICIONS, Finding, Measures, findings, measure
from verify.kernels.judging.families import FAMILIES
from verify.kernels.judging.figures import LARGEST_RELATIVE_ERROR, element_ratios
from verify.kernels.judging.gates import compared, nmse, plain_attention, verdicts
from verify.kernels.kernel import Kernel
from verify.kernels.trace import LaunchTrace
from verify.machine.stages import StageClock

# From this many cells, a cell is one sample; of fewer, each row and head is.
FEWEST_CELLS = 5
# A mean square error that is this small share of the exact output's is the oracle's own rounding.
SMALLEST_SQUARE = 1e-30


@dataclass(frozen=True)
class Inputs:
    """Where a cell's inputs came from; `call` is what the kernels get."""

    shape: str
    n_kv: int
    family: str
    seed: int
    call: Call


@dataclass
class KernelEvidence:
    """One kernel's errors in one cell.

    failure: what it failed with instead of a result; measures and findings: of
    `verify.kernels.judging.detectors`; gates: what the gates of others say; refused: it took none of the
    probes; nmse: square error over the square of exact; worst: [b, row, head, element] of the largest
    |error| / budget, worst_values: got and exact there; cache: type of the kernel's own cache; row_square [T
    * Hq]: square error a row and head, on keys and values as that cache holds them, and given_square the
    same to exact on the inputs as they were given; heat [T, Hq] and ratios: |error| / budget, the largest of
    each row and head, and all."""

    spec: str
    failure: str | None = None
    measures: Measures | None = None
    findings: list[Finding] = field(default_factory=list)
    gates: dict[str, bool] = field(default_factory=dict)
    probes_failed: list[str] = field(default_factory=list)
    refused: bool = False
    nmse: float = math.nan
    worst: tuple[int, ...] = ()
    worst_values: tuple[float, float] = (math.nan, math.nan)
    cache: str = "f16"
    row_square: np.ndarray = field(default_factory=lambda: np.zeros(0))
    given_square: np.ndarray = field(default_factory=lambda: np.zeros(0))
    heat: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    ratios: np.ndarray = field(default_factory=lambda: np.zeros(0))
    output: AttentionOutput | None = None
    trace: LaunchTrace = field(default_factory=LaunchTrace)

    @property
    def severity(self) -> float:
        """How far beyond right, to find the worst: infinite for a kernel that failed."""
        if self.failure is not None or self.probes_failed:
            return math.inf
        m = self.measures
        if m is None:
            return 0.0
        return math.inf if m.nonfinite else max(m.budget, m.relative / LARGEST_RELATIVE_ERROR)

    def figure(self, name: str) -> float:
        """A figure of `measures`, NaN where there are none."""
        return float(getattr(self.measures, name)) if self.measures is not None else math.nan

    def to_json(self) -> dict[str, Any]:
        return {
            "max_budget_ratio": self.figure("budget"),
            "rms_ratio": self.figure("rms"),
            "rms_limit": self.figure("rms_limit"),
            "quadrature_ratio": self.figure("quadrature"),
            "gain": self.figure("gain"),
            "lse_budget_ratio": self.figure("lse"),
            "nmse": self.nmse,
            "vacuous": self.figure("vacuous"),
            "probes_failed": self.probes_failed,
            "findings": [f"{f.detector}: {f.said}" for f in self.findings],
            "failure": self.failure,
            "worst": list(self.worst),
            "worst_values": list(self.worst_values),
            "foreign_gates": self.gates,
        }


@dataclass
class Cell:
    """One candidate in one cell.

    faults: what makes it broken; compared: both kernels gave an output (of a probe only what failed is
    known); covered: its launch trace differs from the baseline's; log_ratio [T * Hq]:
    ln of the ratio of square errors, candidate to baseline, where neither has a fault and logits are distinct
    (equal logits are rounded alike, and their errors add up).
    """

    inputs: Inputs
    baseline: KernelEvidence
    candidate: KernelEvidence
    faults: list[str]
    compared: bool
    covered: bool
    bitwise_equal: bool
    same_spec: bool
    log_ratio: np.ndarray | None


def examine(kernels: Sequence[Kernel], inputs: Inputs, clock: StageClock) -> list[KernelEvidence | None]:
    """Run kernels on a cell's inputs and hold the errors of each against its own arithmetic.

    None for a kernel that does not take what the inputs ask for (sinks, say): no evidence either way. What
    kernels share is computed once: the exact result, budgets of like arithmetics, plain attention.
    """
    call = inputs.call
    tried = []
    for kernel in kernels:
        with clock.stage(kernel.spec, inputs.n_kv):
            tried.append(attempt(kernel, call))
    ran = [i for i, each in enumerate(tried) if each.output is not None]
    due: dict[int, _Due] = {}
    plain = None
    if ran:
        with clock.stage("budgets", inputs.n_kv):
            due = dict(zip(ran, _all_due([kernels[i] for i in ran], call), strict=True))
        with clock.stage("plain attention", inputs.n_kv):
            plain = plain_attention(call)
    found: list[KernelEvidence | None] = []
    for i, (kernel, each) in enumerate(zip(kernels, tried, strict=True)):
        if each.unsupported:
            found.append(None)
            continue
        evidence = KernelEvidence(kernel.spec, cache=kernel.cache, trace=LaunchTrace([each.launched]))
        if each.output is None:
            evidence.failure = each.failure
        elif plain is not None:
            with clock.stage("figures", inputs.n_kv):
                _hold(evidence, inputs, each.output, due[i], plain, kernel.capabilities().lse)
        found.append(evidence)
    return found


class _Due(NamedTuple):
    """What a kernel is held against: the budget of the call as its cache holds it; exact on the inputs."""

    held: Call
    arithmetic: Arithmetic
    budget: Budget
    exact: torch.Tensor


def by_cache(kernels: Sequence[Kernel]) -> list[list[int]]:
    """Indices of kernels that hold the same keys and values, together."""
    found: dict[str, list[int]] = {}
    for i, kernel in enumerate(kernels):
        found.setdefault(kernel.cache, []).append(i)
    return list(found.values())


def _all_due(kernels: Sequence[Kernel], call: Call) -> list[_Due]:
    """For each kernel; kernels with the same cache share what they can."""
    due: dict[int, _Due] = {}
    for which in by_cache(kernels):
        held = kernels[which[0]].held(call)
        arithmetics = [kernels[i].arithmetic_of(call) for i in which]
        budgets = error_budgets(held, arithmetics)
        exact = budgets[0].out if held is call else exact_attention(call).out
        for i, arithmetic, budget in zip(which, arithmetics, budgets, strict=True):
            due[i] = _Due(held, arithmetic, budget, exact)
    return [due[i] for i in range(len(kernels))]


def _hold(
    found: KernelEvidence,
    inputs: Inputs,
    output: AttentionOutput,
    due: _Due,
    plain: torch.Tensor,
    has_lse: bool,
) -> None:
    """Fill in a kernel's evidence: its output against the budget, and what the gates of others say."""
    call, budget, exact = inputs.call, due.budget, due.exact
    found.output = output
    judged = output if has_lse else AttentionOutput(output.out, budget.lse)
    family = FAMILIES.get(inputs.family)
    distinct = family is None or family.distinct
    found.measures = measure(due.held, judged, due.arithmetic, distinct=distinct, budget=budget)
    found.findings = findings(found.measures)
    found.gates = verdicts(compared(call, output.out, exact, plain))
    error = output.out.double() - budget.out
    found.nmse = nmse(output.out, exact)
    place = found.measures.worst
    found.worst = place
    found.worst_values = (float(output.out[place]), float(budget.out[place]))
    ratio = element_ratios(error, budget)
    found.row_square, found.given_square = _row_square(error), _row_square(output.out.double() - exact)
    found.heat = ratio[0].amax(-1).cpu().numpy()
    found.ratios = ratio.flatten().cpu().numpy()


def _row_square(error: torch.Tensor) -> np.ndarray:
    """Square error [T * Hq] of each row and head; what is NaN or Inf is judged elsewhere."""
    squares = torch.where(torch.isfinite(error), error, 0.0).square().sum(-1)
    return np.asarray(squares.flatten().cpu().numpy())


def compare(inputs: Inputs, baseline: KernelEvidence, candidate: KernelEvidence) -> Cell:
    """A candidate's cell."""
    faults = [*faults_of(candidate, "candidate"), *faults_of(baseline, f"baseline {baseline.spec}")]
    a, b = candidate.output, baseline.output
    equal = a is not None and b is not None and same_bits(a.out, b.out)
    family = FAMILIES.get(inputs.family)
    log_ratio = None
    if not faults and (family is None or family.distinct):
        # A cache that both have is no change; one that only one has is charged to it.
        name = "row_square" if candidate.cache == baseline.cache else "given_square"
        mine, its = (np.maximum(getattr(x, name), SMALLEST_SQUARE) for x in (candidate, baseline))
        log_ratio = np.log(mine / its)
    return Cell(
        inputs,
        baseline,
        candidate,
        faults,
        compared=a is not None and b is not None,
        covered=bool(candidate.trace.differs_from(baseline.trace)),
        bitwise_equal=equal,
        same_spec=candidate.spec == baseline.spec,
        log_ratio=log_ratio,
    )


def judge(cells: Sequence[Cell], margin: float) -> tuple[Decision, DistanceRatio | None]:
    """The verdict on one candidate over some cells, and the pooled ratio of root mean square errors.

    Cells in which the plan did not differ, and probes, count only where they are broken.
    """
    faults = [(c.candidate.severity, fault) for c in cells for fault in c.faults]
    faults.sort(key=lambda x: -x[0])
    compared = [c for c in cells if c.compared]
    covered = [c for c in compared if c.covered]
    ratio = pooled(covered)
    decision = decide(
        PairEvidence(
            faults=[fault for _, fault in faults[:1]],
            same_spec=all(c.same_spec for c in cells),
            coverage=len(covered) / max(len(compared), 1),
            bitwise_equal=bool(compared) and all(c.bitwise_equal for c in covered or compared),
            not_compared="" if compared else "probes show faults alone: none was found, and none is compared",
            distance=ratio,
            margin=margin,
            unit="cells",
            narrowed_by="more draws (--seeds) or lengths (--n-kv) narrow it",
        )
    )
    return decision, ratio


def pooled(cells: Sequence[Cell]) -> DistanceRatio | None:
    """The ratio over cells.

    One sample a cell, since its rows and heads share keys and values; where there are few cells, one a row
    and head, which says less about other inputs.
    """
    found = [c.log_ratio for c in cells if c.log_ratio is not None and not c.bitwise_equal]
    if not found:
        return None
    if len(found) >= FEWEST_CELLS:
        return ratio_of_samples(np.array([x.mean() for x in found]))
    return ratio_of_samples(np.concatenate(found))


def faults_of(found: KernelEvidence, called: str) -> list[str]:
    """What makes a kernel `broken` in a cell, as sentences that begin with `called`."""
    if found.failure is not None:
        return [f"{called} failed: {found.failure}"]
    if found.probes_failed:
        more = f" ({len(found.probes_failed)} probes failed)" if len(found.probes_failed) > 1 else ""
        return [f"{called}: {found.probes_failed[0]}{more}"]
    faults = []
    for finding in found.findings:
        if finding.detector in SUSPICIONS:
            continue
        where = ""
        if finding.detector == "budget":
            _, row, head, element = found.worst
            got, exact = found.worst_values
            where = f" at row {row}, head {head}, element {element}: {got:.9g}, exact {exact:.9g}"
        faults.append(f"{called}: {finding.said}{where}")
    return faults


def suspicions(found: KernelEvidence) -> list[str]:
    """What is odd without being a fault."""
    return [finding.said for finding in found.findings if finding.detector in SUSPICIONS]
