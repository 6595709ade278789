"""One cell of the kernel diff report: two kernels on the same inputs, against the oracle and their budgets.

A cell is a shape, a length, a family of inputs and a seed. Cells are judged together, a line of the report
or all of them, by the rules of `verdict`: faults first, then coverage by the launch traces, then the paired
ratio of the two kernels' root mean square errors to float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from kernels.budget import Budget, budget_ratio, error_budget
from kernels.contract import AttentionOutput, Call, Kernel
from kernels.errors import KernelFailure
from kernels.families import FAMILIES
from kernels.trace import LaunchTrace
from verify.arms import same_bits
from verify.inplace import LARGEST_RELATIVE_ERROR
from verify.statistics import DistanceRatio, ratio_of_samples
from verify.verdict import Decision, PairEvidence, decide

# rms(err / expected size) of a correct kernel stays below this where logits are distinct.
LARGEST_RMS_RATIO = 1.3
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

    max_budget_ratio: largest |error| / budget; rms_ratio: rms of error / expected size; quadrature_ratio:
    largest |error| / quadrature; gain: <error, exact> / <exact, exact>; lse_budget_ratio: of lse, NaN if the
    kernel returns none; nmse: mean square error over mean square of exact; vacuous: share of rows and heads
    whose budget says nothing; worst: [row, head, element] of the largest ratio; row_square [T * Hq]: square
    error a row and head; heat [T, Hq]: largest ratio of each.
    """

    spec: str
    failure: str | None = None
    max_budget_ratio: float = math.nan
    rms_ratio: float = math.nan
    quadrature_ratio: float = math.nan
    gain: float = math.nan
    lse_budget_ratio: float = math.nan
    nmse: float = math.nan
    relative_max: float = math.nan
    vacuous: float = 0.0
    nonfinite: int = 0
    worst: tuple[int, ...] = ()
    worst_values: tuple[float, float] = (math.nan, math.nan)
    row_square: np.ndarray = field(default_factory=lambda: np.zeros(0))
    heat: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    ratios: np.ndarray = field(default_factory=lambda: np.zeros(0))
    output: AttentionOutput | None = None
    trace: LaunchTrace = field(default_factory=LaunchTrace)

    @property
    def severity(self) -> float:
        """How far beyond right, to find the worst: infinite for a kernel that failed."""
        if self.failure is not None or self.nonfinite:
            return math.inf
        return max(self.max_budget_ratio, self.relative_max / LARGEST_RELATIVE_ERROR)

    def to_json(self) -> dict[str, Any]:
        plain = ("max_budget_ratio", "rms_ratio", "quadrature_ratio", "gain", "lse_budget_ratio", "nmse")
        return {name: getattr(self, name) for name in plain} | {
            "relative_max": self.relative_max,
            "vacuous": self.vacuous,
            "nonfinite": self.nonfinite,
            "failure": self.failure,
            "worst": list(self.worst),
            "worst_values": list(self.worst_values),
        }


@dataclass
class Cell:
    """One candidate in one cell.

    faults: what makes it broken; covered: its launch trace differs from the baseline's; log_ratio [T * Hq]:
    ln of the ratio of square errors, candidate to baseline, where neither has a fault and logits are distinct
    (equal logits are rounded alike, and their errors add up).
    """

    inputs: Inputs
    baseline: KernelEvidence
    candidate: KernelEvidence
    faults: list[str]
    covered: bool
    bitwise_equal: bool
    same_spec: bool
    log_ratio: np.ndarray | None


def examine(kernel: Kernel, inputs: Inputs) -> KernelEvidence | None:
    """Run a kernel on a cell's inputs and hold its errors against its own arithmetic.

    None where the kernel does not take what the inputs ask for (sinks, say): no evidence either way.
    """
    call = inputs.call
    found = KernelEvidence(kernel.spec)
    kept, kernel.trace = kernel.trace, LaunchTrace()
    try:
        output = kernel.run(call)
    except KernelFailure as failure:
        if failure.kind == "unsupported":
            return None
        found.failure = f"{failure.kind}: {failure}"
        return found
    except Exception as raised:
        found.failure = f"raised: {type(raised).__name__}: {raised}"
        return found
    finally:
        found.trace, kernel.trace = kernel.trace, kept
    found.output = output
    budget = error_budget(call, kernel.arithmetic(call.shape, call.path))
    error = output.out.double() - budget.out
    found.nonfinite = int((~torch.isfinite(error)).any(-1).sum())
    _measure(found, error, budget)
    lse_error = output.lse.double() - budget.lse
    # Equal infinities (an empty row) leave NaN; so does a kernel that returns no lse.
    known = torch.isfinite(lse_error)
    if known.any():
        found.lse_budget_ratio = float((lse_error.abs() / budget.lse_bound)[known].max())
    return found


def _measure(found: KernelEvidence, error: torch.Tensor, budget: Budget) -> None:
    ratio = budget_ratio(error, budget.bound)
    judged = torch.where(budget.vacuous[..., None], 0.0, ratio)
    flat = int(judged.argmax())
    place = np.unravel_index(flat, tuple(judged.shape))
    found.worst = tuple(int(i) for i in place[1:])
    exact_value = float(budget.out.flatten()[flat])
    found.worst_values = (exact_value + float(error.flatten()[flat]), exact_value)
    found.max_budget_ratio = float(judged.max())
    found.vacuous = float(budget.vacuous.double().mean())
    clean = torch.where(torch.isfinite(error), error, 0.0)
    relative = clean.norm(dim=-1) / budget.size.norm(dim=-1).clamp(min=1e-300)
    found.relative_max = float(torch.where(budget.vacuous, relative, 0.0).max())
    expected = budget.expected
    known = expected > 0
    if known.any():
        # Unit the row and head: one heavy element must not stand for all.
        scaled = torch.where(known, clean / expected.clamp(min=1e-300), 0.0).square()
        found.rms_ratio = float((scaled.sum() / known.sum()).sqrt())
        quadrature = torch.where(
            budget.quadrature > 0, clean.abs() / budget.quadrature.clamp(min=1e-300), 0.0
        )
        found.quadrature_ratio = float(quadrature.max())
    power = float(budget.out.square().sum())
    if power > 0:
        found.gain = float((clean * budget.out).sum()) / power
        found.nmse = float(clean.square().sum()) / power
    found.row_square = clean.square().sum(-1).flatten().cpu().numpy()
    found.heat = judged[0].amax(-1).cpu().numpy()
    found.ratios = judged.flatten().cpu().numpy()


def compare(inputs: Inputs, baseline: KernelEvidence, candidate: KernelEvidence) -> Cell:
    """A candidate's cell."""
    faults = [*faults_of(candidate, "candidate"), *faults_of(baseline, f"baseline {baseline.spec}")]
    equal = (
        candidate.output is not None
        and baseline.output is not None
        and same_bits(candidate.output.out, baseline.output.out)
    )
    family = FAMILIES.get(inputs.family)
    log_ratio = None
    if not faults and (family is None or family.distinct):
        a, b = (np.maximum(x.row_square, SMALLEST_SQUARE) for x in (candidate, baseline))
        log_ratio = np.log(a / b)
    return Cell(
        inputs,
        baseline,
        candidate,
        faults,
        covered=bool(candidate.trace.differs_from(baseline.trace)),
        bitwise_equal=equal,
        same_spec=candidate.spec == baseline.spec,
        log_ratio=log_ratio,
    )


def judge(cells: Sequence[Cell], margin: float) -> tuple[Decision, DistanceRatio | None]:
    """The verdict on one candidate over some cells, and the pooled ratio of root mean square errors.

    Cells in which the plan did not differ count only where they are broken.
    """
    faults = [(c.candidate.severity, fault) for c in cells for fault in c.faults]
    faults.sort(key=lambda x: -x[0])
    covered = [c for c in cells if c.covered]
    ratio = pooled(covered)
    decision = decide(
        PairEvidence(
            faults=[fault for _, fault in faults[:1]],
            same_spec=all(c.same_spec for c in cells),
            coverage=len(covered) / len(cells),
            bitwise_equal=all(c.bitwise_equal for c in covered or cells),
            distance=ratio,
            margin=margin,
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
    faults = []
    if found.failure is not None:
        return [f"{called} failed: {found.failure}"]
    row, head, element = found.worst
    got, exact = found.worst_values
    if found.nonfinite:
        faults.append(f"{called}: NaN or Inf in {found.nonfinite} rows and heads")
    elif found.max_budget_ratio > 1:
        faults.append(
            f"{called}: error is {found.max_budget_ratio:.3g} times its rounding budget at row {row},"
            f" head {head}, element {element}: {got:.9g}, exact {exact:.9g}"
        )
    if found.relative_max > LARGEST_RELATIVE_ERROR:
        faults.append(
            f"{called}: error is {found.relative_max:.1%} of sum p|v|, where no correct kernel exceeds 1/8"
        )
    if found.lse_budget_ratio > 1:
        faults.append(f"{called}: lse is off by {found.lse_budget_ratio:.3g} times its budget")
    return faults


def suspicions(found: KernelEvidence, family: str) -> list[str]:
    """What is odd without being a fault: errors larger than rounding usually makes them."""
    known = FAMILIES.get(family)
    if known is not None and known.distinct and found.rms_ratio > LARGEST_RMS_RATIO:
        return [f"errors are {found.rms_ratio:.2g} times their expected size"]
    return []
