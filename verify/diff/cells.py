"""One cell of the kernel diff report: two kernels on the same inputs, against the oracle and their budgets.

A cell is a shape, a length, a family of inputs and a seed. Its first rows, and of all others the one that
errs most, are held against budgets; the energies of all rows' errors are samples of the stratum that shape,
length and family are. Cells are judged together by the rules of `verdict`: faults first, then coverage by
the launch traces, then the strata.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from verify.arms.attempt import attempt
from verify.judge.strata import Judgement, Stratum, judge_strata
from verify.judge.verdict import Decision, PairEvidence, decide
from verify.kernels.bits import same_bits
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import Budget, error_budgets
from verify.kernels.cache_types import CacheSpec
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.exact import exact_attention
from verify.kernels.judging.detectors import SUSPICIONS, Finding, Measures, findings, measure
from verify.kernels.judging.emulation import limit_of_float16_sums
from verify.kernels.judging.families import FAMILIES
from verify.kernels.judging.figures import (
    LARGEST_RELATIVE_ERROR,
    element_ratios,
    shared_fault,
    shared_overflow,
)
from verify.kernels.judging.gates import compared, nmse, plain_attention, verdicts
from verify.kernels.kernel import Kernel
from verify.kernels.trace import LaunchTrace
from verify.machine.stages import StageClock

# Rows of a cell, from the first, whose budgets are derived: a budget costs ten times its exact result.
CHECKED_ROWS = 8


# Bits behind the leading one, and the exponent of the smallest number, of a result's type.
_STEPS = {"f16": (10, -24), "bf16": (7, -133), "f32": (23, -149)}


@dataclass(frozen=True)
class CellInputs:
    """Where a cell's inputs came from, and what kernels get."""

    shape: str  # of the layer, by name
    n_kv: int  # keys of the longest row
    family: str  # of inputs
    seed: int  # that they are drawn with
    call: Call  # what the kernels get
    # Numbers of those that they are for: where plans cut depends on the candidate; None: all.
    candidates: tuple[int, ...] | None = None


@dataclass
class KernelEvidence:
    """One kernel's errors in one cell."""

    spec: str  # of the kernel
    failure: str | None = None  # what it failed with instead of a result
    measures: Measures | None = None  # see `verify.kernels.judging.detectors`
    findings: list[Finding] = field(default_factory=list)  # see there
    gates: dict[str, bool] = field(default_factory=dict)  # what the gates of others say
    probes_failed: list[str] = field(default_factory=list)  # sentences
    refused: bool = False  # it took none of the probes
    # What it does not keep of the contract, where that is no fault.
    contract: str = ""
    nmse: float = math.nan  # square error over the square of exact
    worst: tuple[int, ...] = ()  # (b, row, head, element) of the largest |error| / budget
    worst_values: tuple[float, float] = (math.nan, math.nan)  # got and exact there
    cache: str = "f16"  # type of the kernel's own
    result_type: str = "f32"  # that its results are numbers of
    # [B * T, Hq]: mean square error of a row and head, on k and v as its cache holds them.
    energy: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    # The same to exact on the inputs as they were given.
    given_energy: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    exact: torch.Tensor | None = None  # on the inputs as they were given
    # [rows, Hq]: largest |error| / budget of checked rows.
    heat: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    # |error| / budget of all checked elements.
    ratios: np.ndarray = field(default_factory=lambda: np.zeros(0))
    output: AttentionOutput | None = None  # None where it failed
    trace: LaunchTrace = field(default_factory=LaunchTrace)  # what it launched

    @property
    def severity(self) -> float:
        """How far beyond right by whatever detector fired, else by its budget: to find the worst. Infinite
        for a kernel that failed; 0 where nothing says anything."""
        if self.failure is not None or self.probes_failed:
            return math.inf
        m = self.measures
        if m is None:
            return 0.0
        if m.nonfinite:
            return math.inf
        each = {
            "budget": max(m.budget, m.relative / LARGEST_RELATIVE_ERROR),
            "rms": m.rms / m.rms_limit,
            "gain": abs(m.gain) / m.gain_limit if m.gain_limit else math.nan,
            "lse": m.lse,
        }
        fired = {finding.detector for finding in self.findings} & each.keys()
        return max((x for name, x in each.items() if name in fired and x > 0), default=each["budget"])

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
    """One candidate in one cell."""

    inputs: CellInputs  # that both kernels got
    baseline: KernelEvidence  # its errors
    candidate: KernelEvidence  # its errors
    faults: list[str]  # what makes it broken, sentences
    compared: bool  # both gave an output; of a probe only what failed is known
    covered: bool  # its launch trace differs from the baseline's
    bitwise_equal: bool  # both outputs
    same_spec: bool  # both are of one specification
    # Errors of both by row and head, where neither has a fault and logits are distinct: equal logits are
    # rounded alike, and their errors add up.
    stratum: Stratum | None
    # A fault that both have, bit for bit the same.
    shared: str = ""


def examine(kernels: Sequence[Kernel], inputs: CellInputs, clock: StageClock) -> list[KernelEvidence | None]:
    """Run kernels on a cell's inputs and hold the errors of each against its own arithmetic.

    None for a kernel that does not take what the inputs ask for (sinks, say): no evidence either way. What
    kernels share is computed once: the exact result, budgets of like arithmetics, plain attention.
    """
    call = inputs.call
    tried = []
    for kernel in kernels:
        with clock.stage(kernel.spec, inputs.n_kv):
            tried.append(attempt(kernel, call))
    ran = {i: each.output.out for i, each in enumerate(tried) if each.output is not None}
    due: dict[int, _Due] = {}
    plain = None
    if ran:
        with clock.stage("budgets", inputs.n_kv):
            found_due = _all_due([kernels[i] for i in ran], call, list(ran.values()))
            due = dict(zip(ran, found_due, strict=True))
        with clock.stage("plain attention", inputs.n_kv):
            plain = plain_attention(_rows_of(call, range(min(CHECKED_ROWS, call.shape.rows))))
    found: list[KernelEvidence | None] = []
    for i, (kernel, each) in enumerate(zip(kernels, tried, strict=True)):
        if each.unsupported:
            found.append(None)
            continue
        evidence = KernelEvidence(kernel.spec, cache=str(kernel.cache), trace=LaunchTrace([each.launched]))
        evidence.result_type = kernel.result_type(call)
        if each.output is None:
            evidence.failure = each.failure
        elif plain is not None:
            with clock.stage("figures", inputs.n_kv):
                _hold(evidence, inputs, each.output, due[i], plain, kernel.capabilities().lse)
        found.append(evidence)
    return found


class _Due(NamedTuple):
    """What a kernel is held against."""

    held: Call  # checked rows of the call, as its cache holds them
    arithmetic: Arithmetic  # of the kernel
    budget: Budget  # of those rows
    exact: torch.Tensor  # of all rows, on the inputs as they were given
    exact_held: torch.Tensor  # of all rows, as its cache holds them
    worst: int | None  # the row, beyond the checked ones, that errs most; None: none
    worst_budget: Budget | None  # of that row


def by_cache(kernels: Sequence[Kernel]) -> list[list[int]]:
    """Indices of kernels that hold the same keys and values, together."""
    found: dict[CacheSpec, list[int]] = {}
    for i, kernel in enumerate(kernels):
        found.setdefault(kernel.cache, []).append(i)
    return list(found.values())


def _all_due(kernels: Sequence[Kernel], call: Call, outs: Sequence[torch.Tensor]) -> list[_Due]:
    """For each kernel and its output; kernels with the same cache share what they can."""
    due: dict[int, _Due] = {}
    given = exact_attention(call).out
    first = range(min(CHECKED_ROWS, call.shape.rows))
    for which in by_cache(kernels):
        held = kernels[which[0]].held(call)
        exact = given if held is call else exact_attention(held).out
        # Of the whole call: rows of the prefill path share cuts.
        arithmetics = [kernels[i].arithmetic_of(call) for i in which]
        checked = _rows_of(held, first)
        budgets = error_budgets(checked, arithmetics)
        worst = [_worst_row(outs[i], exact, len(first)) for i in which]
        rows = sorted({row for row in worst if row is not None})
        others = error_budgets(_rows_of(held, rows), arithmetics) if rows else []
        for at, i in enumerate(which):
            row = worst[at]
            own = None
            if row is not None:
                columns = {name: x[:, [rows.index(row)]] for name, x in others[at]._asdict().items()}
                own = Budget(**columns)
            due[i] = _Due(
                held=checked,
                arithmetic=arithmetics[at],
                budget=budgets[at],
                exact=given,
                exact_held=exact,
                worst=row,
                worst_budget=own,
            )
    return [due[i] for i in range(len(kernels))]


def _rows_of(call: Call, rows: Sequence[int]) -> Call:
    """Some query rows of a call."""
    if len(rows) == call.shape.rows:
        return call
    return call.of_rows(torch.tensor(list(rows), device=call.q.device))


def _worst_row(out: torch.Tensor, exact: torch.Tensor, checked: int) -> int | None:
    """The row beyond the checked ones whose error is largest beside its own result, in any head."""
    if out.shape[1] <= checked or out.shape[0] == 0:
        return None
    error = (out.double() - exact)[:, checked:]
    size = error.norm(dim=-1) / exact[:, checked:].norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    size = torch.where(torch.isfinite(size), size, math.inf)
    return checked + int(size.amax((0, 2)).argmax())


def _hold(
    found: KernelEvidence,
    inputs: CellInputs,
    output: AttentionOutput,
    due: _Due,
    plain: torch.Tensor,
    has_lse: bool,
) -> None:
    """Fill in a kernel's evidence: its output against the budget, and what the gates of others say."""
    budget, rows = due.budget, due.held.shape.rows
    found.output, found.exact = output, due.exact
    head = AttentionOutput(output.out[:, :rows], output.lse[:, :rows])
    judged = head if has_lse else AttentionOutput(head.out, budget.lse)
    family = FAMILIES.get(inputs.family)
    distinct = family is None or family.distinct
    measures = measure(due.held, judged, due.arithmetic, distinct=distinct, budget=budget)
    place = measures.worst
    found.worst_values = float(head.out[place]), float(budget.out[place])
    if due.worst is not None and due.worst_budget is not None:
        alone = slice(due.worst, due.worst + 1)
        lse = output.lse[:, alone] if has_lse else due.worst_budget.lse
        one = measure(
            replace(due.held, kv_len=inputs.call.kv_len[:, alone]),
            AttentionOutput(output.out[:, alone], lse),
            due.arithmetic,
            distinct=False,
            budget=due.worst_budget,
        )
        if one.nonfinite or (one.budget, one.relative) > (measures.budget, measures.relative):
            b, _, h, element = one.worst
            found.worst_values = (
                float(output.out[:, alone][one.worst]),
                float(due.worst_budget.out[one.worst]),
            )
            measures = measures._replace(
                budget=one.budget,
                relative=one.relative,
                nonfinite=one.nonfinite,
                worst=(b, due.worst, h, element),
            )
        measures = measures._replace(lse=max(measures.lse, one.lse))
    found.measures = measures
    found.findings = findings(measures)
    if family is not None and any(finding.detector == "budget" for finding in found.findings):
        # Of inputs that were drawn; what overflows on a real model's is wrong there.
        asked = inputs.call
        held = replace(due.held, q=asked.q, kv_len=asked.kv_len, mask=asked.mask, keys=asked.keys)
        limit = limit_of_float16_sums(held, output.out, due.exact_held, due.arithmetic)
        if limit is not None:
            kept = [f for f in found.findings if f.detector in SUSPICIONS or f.detector == "lse"]
            found.findings = [*kept, Finding("limit", limit)]
    found.worst = measures.worst
    exact = due.exact[:, :rows]
    found.gates = verdicts(compared(due.held, head.out, exact, plain))
    found.nmse = nmse(output.out, due.exact)
    ratio = element_ratios(head.out.double() - budget.out, budget)
    found.energy, found.given_energy = (_energy(output.out, x) for x in (due.exact_held, due.exact))
    found.heat = ratio[0].amax(-1).cpu().numpy()
    found.ratios = ratio.flatten().cpu().numpy()


def smallest_squares(exact: torch.Tensor, out: str) -> torch.Tensor:
    """What a result of type `out` cannot show: the square of a quarter of its step at each row's root mean
    square. exact [..., Dv] float64 -> [...]."""
    bits, least = _STEPS[out]
    size = exact.square().mean(-1).sqrt()
    exponent = torch.frexp(size.clamp(min=2.0**-1000)).exponent.double() - 1
    return (torch.exp2((exponent - bits).clamp(min=least)) / 4).square()


def _energy(out: torch.Tensor, exact: torch.Tensor) -> np.ndarray:
    """Mean square error [B * T, Hq] of each row and head; NaN and Inf are off by the whole result."""
    squares = torch.where(torch.isfinite(out), out.double() - exact, exact).square().mean(-1)
    return np.asarray(squares.flatten(0, 1).cpu().numpy())


def compare(inputs: CellInputs, baseline: KernelEvidence, candidate: KernelEvidence) -> Cell:
    """A candidate's cell."""
    faults = [*faults_of(candidate, "candidate"), *faults_of(baseline, f"baseline {baseline.spec}")]
    a, b = candidate.output, baseline.output
    equal = a is not None and b is not None and same_bits(a.out, b.out)
    shared = ""
    both_have = faults_of(baseline, "both")
    if both_have and (equal or candidate.probes_failed == baseline.probes_failed != []):
        # What both have to the bit is not the candidate's doing.
        shared, faults = shared_fault(both_have), []
    elif overflows_nowhere_else(candidate, baseline):
        assert candidate.measures is not None and baseline.measures is not None
        shared, faults = shared_overflow(candidate.measures.nonfinite, baseline.measures.nonfinite), []
    family = FAMILIES.get(inputs.family)
    comparable = not faults and not shared and (family is None or family.distinct)
    comparable = comparable and candidate.exact is not None
    return Cell(
        inputs=inputs,
        baseline=baseline,
        candidate=candidate,
        faults=faults,
        compared=a is not None and b is not None,
        covered=bool(candidate.trace.differs_from(baseline.trace)),
        bitwise_equal=equal,
        same_spec=candidate.spec == baseline.spec,
        stratum=_stratum(inputs, baseline, candidate) if comparable else None,
        shared=shared,
    )


def overflows_nowhere_else(candidate: KernelEvidence, baseline: KernelEvidence) -> bool:
    """Whether all that is wrong with a candidate are elements that are NaN or Inf in its baseline too."""
    a, b, measured = candidate.output, baseline.output, candidate.measures
    if (
        a is None
        or b is None
        or measured is None
        or not measured.nonfinite
        or len(faults_of(candidate, "")) > 1
    ):
        return False
    return bool((torch.isfinite(a.out) | ~torch.isfinite(b.out)).all())


def _stratum(inputs: CellInputs, baseline: KernelEvidence, candidate: KernelEvidence) -> Stratum:
    """Both kernels' errors on the rows that are of the cell's length."""
    call, exact = inputs.call, candidate.exact
    assert exact is not None
    # A cache that both have is no change; one that only one has is charged to it.
    name = "energy" if candidate.cache == baseline.cache else "given_energy"
    # What the finer of both types cannot show: `out=f32`, written out, asks about the coarser one.
    out = max(candidate.result_type, baseline.result_type, key=lambda x: _STEPS[x][0])
    rows = torch.ones_like(call.kv_len, dtype=torch.bool)
    if inputs.family in FAMILIES and call.path == "decode":
        rows = call.kv_len == inputs.n_kv
    chosen = rows.flatten().cpu().numpy()
    per_row = (smallest_squares(exact, out), exact.square().mean(-1))
    floor, power = (x.flatten(0, 1).cpu().numpy()[chosen] for x in per_row)
    return Stratum(
        shape=inputs.shape,
        n_kv=inputs.n_kv,
        family=inputs.family,
        candidate=getattr(candidate, name)[chosen],
        reference=getattr(baseline, name)[chosen],
        floor=floor,
        power=power,
        heads=tuple(range(call.shape.q_heads)),
        a_kv_head=call.shape.ratio,
    )


def judge_cells(cells: Sequence[Cell], margin: float) -> Judgement:
    """The strata of one candidate's cells in which another plan ran: draws of a kind of input are one."""
    kinds: dict[tuple[str, int, str], list[Stratum]] = {}
    for cell in cells:
        if cell.stratum is not None and cell.covered and len(cell.stratum.candidate):
            s = cell.stratum
            kinds.setdefault((s.shape, s.n_kv, s.family), []).append(s)
    return judge_strata([joined(of_kind) for of_kind in kinds.values()], margin)


def joined(draws: Sequence[Stratum]) -> Stratum:
    """Draws of one kind of input as one stratum."""
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(d, name) for d in draws])
        for name in ("candidate", "reference", "floor", "power")
    }
    return replace(draws[0], **arrays)


def decide_cells(
    cells: Sequence[Cell], judgement: Judgement, *, margin: float, allow_same: bool, narrowed_by: str
) -> Decision:
    """The verdict on one candidate over some cells, whose strata are judged among all.

    Cells in which the plan did not differ, and probes, count only where they are broken.
    """
    faults = [(c.candidate.severity, fault) for c in cells for fault in c.faults]
    faults.sort(key=lambda x: -x[0])
    compared = [c for c in cells if c.compared]
    covered = [c for c in compared if c.covered]
    return decide(
        PairEvidence(
            faults=[fault for _, fault in faults[:1]],
            same_spec=all(c.same_spec for c in cells),
            coverage=len(covered) / max(len(compared), 1),
            bitwise_equal=bool(compared) and all(c.bitwise_equal for c in covered or compared),
            not_compared="" if compared else "probes show faults alone: none was found, and none is compared",
            distance=None,
            margin=margin,
            unit="cells",
            reference="baseline",
            narrowed_by=narrowed_by,
            allow_same=allow_same,
            strata=judgement,
        )
    )


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
