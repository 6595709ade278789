"""Kernels on the inputs of one cell of the kernel diff report: what each errs by.

A cell is a shape, a length, a family of inputs and a seed. Its first rows, and of all others the one that
errs most, are held against budgets; of all rows the energies of their errors are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from verify.arms.alone import AskedRow, TimeShare, is_asked_alone, rows_as_sequences, single_call
from verify.arms.attempt import attempt
from verify.kernels.bits import different, digest_of
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import Budget, error_budgets, rounding_key
from verify.kernels.cache_types import CacheSpec
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.exact import exact_attention
from verify.kernels.judging.detectors import SUSPICIONS, Finding, Measures, findings, measure
from verify.kernels.judging.emulation import limit_of_float16_sums
from verify.kernels.judging.families import ALL_FAMILIES
from verify.kernels.judging.figures import (
    LARGEST_RELATIVE_ERROR,
    element_ratios,
)
from verify.kernels.judging.gates import compared, nmse, plain_attention, verdicts
from verify.kernels.kernel import Kernel
from verify.kernels.trace import LaunchTrace, heads_launched_alike
from verify.machine.stages import StageClock

# Rows of a cell, from the first, whose budgets are derived: a budget costs ten times its exact result.
CHECKED_ROWS = 8


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
    before: Call | None = None  # a call that is made first, and whose result nobody looks at
    known: Call | None = None  # the same call, hidden keys finite: exact results are derived of it
    said_only: bool = False  # what is wrong in it is said, and no fault
    look: int = 1  # that it was drawn for, of those at its kind of input
    alone: bool = True  # single tokens are asked too, of kernels that are asked any
    faults_alone: bool = False  # too few rows for more than a fault: no stratum

    @property
    def exact_call(self) -> Call:
        return self.known or self.call

    @classmethod
    def later(cls, draw: Callable[[], Call], **fields: Any) -> CellInputs:
        """Inputs whose call is drawn when it is first asked for: of processes that share inputs, in the one
        that asks them. fields: all others."""
        found = cls(call=None, **fields)  # type: ignore[arg-type]
        del found.__dict__["call"]
        found.__dict__["_draw"] = draw
        return found

    def __getattr__(self, name: str) -> Any:
        if name != "call" or "_draw" not in self.__dict__:
            raise AttributeError(name)
        self.__dict__["call"] = self.__dict__.pop("_draw")()
        return self.__dict__["call"]


@dataclass(kw_only=True)
class AloneEvidence:
    """What a kernel that is not computed as if alone did with one query token a call, in one cell."""

    calls: int = 0  # of the first rows
    refused: str | None = None  # that it takes no such call, in its words
    failure: str | None = None  # what it failed with
    measures: Measures | None = None  # as of the cell's checked rows
    findings: list[Finding] = field(default_factory=list)  # by these
    other_bits: int = 0  # calls whose row has other bits than in the call of many
    out: torch.Tensor | None = None  # [1, calls, Hq, Dv]
    bits: str = ""  # a hash of it, where it is stored or held against what is
    energy: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))  # as `KernelEvidence` has it
    given_energy: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))  # likewise
    against_many: float = math.nan  # of rms errors: these over those of the same rows in the call of many

    def to_json(self) -> dict[str, Any]:
        def figure(name: str) -> float:
            return float(getattr(self.measures, name)) if self.measures is not None else math.nan

        return {
            "calls": self.calls,
            "other_bits": self.other_bits,
            "against_many": self.against_many,
            "max_budget_ratio": figure("budget"),
            "rms_ratio": figure("rms"),
            "gain": figure("gain"),
            "findings": [f"{f.detector}: {f.said}" for f in self.findings],
            "failure": self.failure or self.refused,
        }


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
    typical: float = (
        0.0  # of a baseline: its error on plain inputs of this shape and length (`typical_error`)
    )
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
    alone: AloneEvidence | None = None  # single tokens, of a kernel that is asked them
    # A hash of the output, where it is stored or held against what is.
    bits: str = ""
    bits_of_first: str = ""  # likewise of its checked rows
    # [B, T, Hq, Dv]: elements that are finite, of a stored output in which some are not.
    finite: torch.Tensor | None = None

    @property
    def ran(self) -> bool:
        """Whether it gave an output, now or when it was stored."""
        return self.output is not None or bool(self.bits)

    def seal(self) -> None:
        """Hash the outputs, so that they can be compared with those of another run."""
        if self.output is not None:
            out = self.output.out
            self.bits = digest_of(out)
            self.bits_of_first = digest_of(out[:, :CHECKED_ROWS])
        if self.alone is not None and self.alone.out is not None:
            self.alone.bits = digest_of(self.alone.out)

    def rows_alone(self, calls: int) -> torch.Tensor | None:
        """Results of the first rows as single tokens: of a kernel that computes as if alone, those it has."""
        if self.alone is not None:
            return self.alone.out
        return None if self.output is None else self.output.out[:, :calls]

    @property
    def severity(self) -> float:
        """How far beyond right by whatever detector fired, else by its budget: to find the worst. Infinite
        for a kernel that failed; 0 where nothing says anything."""
        if self.failure is not None or self.probes_failed:
            return math.inf
        m = self.measures
        if m is None:
            return 0.0
        if m.nonfinite or m.zeroed:
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
            "alone": self.alone.to_json() if self.alone is not None else None,
            "worst": list(self.worst),
            "worst_values": list(self.worst_values),
            "foreign_gates": self.gates,
        }


def examine(
    kernels: Sequence[Kernel], inputs: CellInputs, clock: StageClock, share: TimeShare | None = None
) -> list[KernelEvidence | None]:
    """Run kernels on a cell's inputs and hold the errors of each against its own arithmetic.

    share: of the run's time, for single tokens of kernels that are asked them; None: none are asked.

    None for a kernel that does not take what the inputs ask for (sinks, say): no evidence either way. What
    kernels share is computed once: the exact result, budgets of like arithmetics, plain attention.
    """
    call = inputs.exact_call
    tried = []
    for kernel in kernels:
        with clock.stage(kernel.spec, inputs.n_kv):
            if inputs.before is not None:
                attempt(kernel, inputs.before)
            tried.append(attempt(kernel, inputs.call))
    ran = {i: each.output.out for i, each in enumerate(tried) if each.output is not None}
    due: dict[int, _Due] = {}
    plain = None
    if ran:
        with clock.stage("budgets", inputs.n_kv):
            found_due = _all_due([kernels[i] for i in ran], call, list(ran.values()))
            due = dict(zip(ran, found_due, strict=True))
        with clock.stage("plain attention", inputs.n_kv):
            plain = plain_attention(_rows_of(call, _checked_rows(call)))
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
            # A sequence's rows, one by one; kinds of calls are asked as they are.
            side_by_side = call.block_table is None and call.cu_seqlens is None and call.shape.batch == 1
            one_by_one = side_by_side and inputs.before is None and inputs.known is None
            asked = share is not None and inputs.alone and one_by_one
            if share is not None and asked and is_asked_alone(kernel, call.path):
                with clock.stage("one query token a call", inputs.n_kv):
                    _ask_alone(evidence, kernel, inputs, due[i], share)
        found.append(evidence)
    return found


def typical_error(kernel: Kernel, call: Call) -> float:
    """A kernel's mean square error over the mean square of the result, in the longest rows of a call; 0 where
    it gives no result, or none that is finite."""
    tried = attempt(kernel, call)
    if tried.output is None:
        return 0.0
    exact = exact_attention(kernel.held(call)).out
    longest = call.kv_len == call.kv_len.max()
    error, size = ((x[longest].square().sum()) for x in (tried.output.out.double() - exact, exact))
    found = float(error / size)
    return found if math.isfinite(found) else 0.0


class _Due(NamedTuple):
    """What a kernel is held against."""

    held: Call  # checked rows of the call, as its cache holds them
    arithmetic: Arithmetic  # of the kernel
    budget: Budget  # of those rows
    exact: torch.Tensor  # of all rows, on the inputs as they were given
    exact_held: torch.Tensor  # of all rows, as its cache holds them
    worst: int | None  # the row, beyond the checked ones, that errs most; None: none
    worst_budget: Budget | None  # of that row
    longest: Arithmetic  # of the kernel on the longest rows: of shorter ones less can be read


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
    first = _checked_rows(call)
    for which in by_cache(kernels):
        held = kernels[which[0]].held(call)
        exact = given if held is call else exact_attention(held).out
        # Of the whole call: rows of the prefill path share cuts.
        arithmetics = [kernels[i].arithmetic_of(call) for i in which]
        worst = [_worst_row(outs[i], exact, len(first)) for i in which]
        # The checked rows come first.
        rows = [*first, *sorted({row for row in worst if row is not None})]
        budgets = error_budgets(_rows_of(held, rows), arithmetics)
        checked = _rows_of(held, first)
        for at, i in enumerate(which):
            row = worst[at]
            own = None if row is None else _budget_of_rows(budgets[at], rows.index(row), 1)
            due[i] = _Due(
                held=checked,
                arithmetic=arithmetics[at],
                budget=_budget_of_rows(budgets[at], 0, len(first)),
                exact=given,
                exact_held=exact,
                worst=row,
                worst_budget=own,
                longest=_of_longest(kernels[i], call, arithmetics[at]),
            )
    return [due[i] for i in range(len(kernels))]


def _budget_of_rows(budget: Budget, first: int, count: int) -> Budget:
    """Some of its rows, one after another."""
    return Budget(**{name: x[:, first : first + count] for name, x in budget._asdict().items()})


def _of_longest(kernel: Kernel, call: Call, arithmetic: Arithmetic) -> Arithmetic:
    """The arithmetic of a call whose own is assumed, as it is on its longest rows alone."""
    if arithmetic.stated or call.cu_seqlens is not None or not call.kv_len.numel():
        return arithmetic
    lengths = call.kv_len.amax(0)
    return kernel.arithmetic_of(call.of_rows((lengths == lengths.max()).nonzero()[:, 0]))


def _checked_rows(call: Call) -> range:
    """Rows of which budgets are derived: all of packed tokens, which cannot be narrowed, and are few."""
    return range(call.shape.rows if call.cu_seqlens is not None else min(CHECKED_ROWS, call.shape.rows))


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
    family = ALL_FAMILIES.get(inputs.family)
    distinct = family is None or family.distinct
    alike = family is not None and heads_launched_alike(found.trace.rows)
    measures = measure(due.held, judged, due.arithmetic, distinct=distinct, budget=budget, heads_alike=alike)
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
    if family is not None:
        # What overflows on a real model's inputs is wrong there.
        asked = inputs.exact_call
        held = replace(due.held, q=asked.q, kv_len=asked.kv_len, mask=asked.mask, keys=asked.keys)
        found.findings = _excused(found.findings, held, output.out, due.exact_held, due.longest)
    found.worst = measures.worst
    exact = due.exact[:, :rows]
    found.gates = verdicts(compared(due.held, head.out, exact, plain))
    found.nmse = nmse(output.out, due.exact)
    ratio = element_ratios(head.out.double() - budget.out, budget)
    found.energy, found.given_energy = (row_energy(output.out, x) for x in (due.exact_held, due.exact))
    found.heat = ratio[0].amax(-1).cpu().numpy()
    found.ratios = ratio.flatten().cpu().numpy()


def _ask_alone(
    found: KernelEvidence, kernel: Kernel, inputs: CellInputs, due: _Due, share: TimeShare
) -> None:
    """Ask the checked rows one query token a call, and hold them against the budgets that they have."""
    assert found.output is not None
    rows, many = due.held.shape.rows, found.output
    # A look that is taken for them takes the time that it takes: what it decides is no matter of load.
    if inputs.look == 1 and not share.allows():
        share.left_out += rows
        return
    began = time.monotonic()
    results = []
    found.alone = alone = AloneEvidence()
    for row in range(rows):
        # Every other one with the keys that the row sees, and no more.
        tried = attempt(kernel, single_call(inputs.call, AskedRow(0, row, spare=row % 4 in (1, 2))))
        found.trace.count(tried.launched)
        if tried.output is None:
            if tried.unsupported:
                alone.refused = tried.failure
            else:
                alone.failure = tried.failure
            share.add(time.monotonic() - began)
            return
        results.append(tried.output)
    alone.calls = rows
    alone.out = out = torch.cat([each.out for each in results], 1)
    lse = torch.cat([each.lse for each in results], 1) if kernel.capabilities().lse else due.budget.lse
    family = ALL_FAMILIES.get(inputs.family)
    arithmetic, budget = _due_alone(kernel, due)
    alone.measures = measure(
        due.held,
        AttentionOutput(out, lse),
        arithmetic,
        distinct=family is None or family.distinct,
        budget=budget,
        heads_alike=family is not None and heads_launched_alike(found.trace.rows),
    )
    alone.findings = findings(alone.measures)
    exact = due.exact_held[:, :rows]
    if family is not None:
        one = due.held.of_rows(due.held.kv_len[0].argmax()[None])
        longest = _of_longest(kernel, one, arithmetic)
        alone.findings = _excused(alone.findings, due.held, out, exact, longest)
    alone.energy, alone.given_energy = (row_energy(out, x) for x in (exact, due.exact[:, :rows]))
    alone.other_bits = int(different(out, many.out[:, :rows]).flatten(2).any(-1).sum())
    of_many = row_energy(many.out[:, :rows], exact)
    if of_many.any():
        alone.against_many = math.sqrt(float(alone.energy.sum() / of_many.sum()))
    share.add(time.monotonic() - began)


def _due_alone(kernel: Kernel, due: _Due) -> tuple[Arithmetic, Budget]:
    """What rows that are asked alone are held against: where it was read off a kernel, its arithmetic of one
    query token."""
    lengths = due.held.kv_len.unique().tolist()
    arithmetic = kernel.arithmetic_of(rows_as_sequences(due.held))
    if rounding_key(arithmetic, lengths) == rounding_key(due.arithmetic, lengths):
        return due.arithmetic, due.budget
    return arithmetic, error_budgets(due.held, [arithmetic])[0]


def _excused(
    found: list[Finding], held: Call, out: torch.Tensor, exact: torch.Tensor, arithmetic: Arithmetic
) -> list[Finding]:
    """Of inputs that were drawn: what float16 sums cannot do is a limit of theirs and no fault."""
    if not any(finding.detector == "budget" for finding in found):
        return found
    limit = limit_of_float16_sums(held, out, exact, arithmetic)
    if limit is None:
        return found
    kept = [f for f in found if f.detector in SUSPICIONS or f.detector == "lse"]
    return [*kept, Finding("limit", limit)]


def finite_of(found: KernelEvidence) -> torch.Tensor | None:
    """[B, T, Hq, Dv]: which elements of an output are finite; None where all are, or there is none."""
    return found.finite if found.output is None else torch.isfinite(found.output.out)


def row_energy(out: torch.Tensor, exact: torch.Tensor) -> np.ndarray:
    """Mean square error [B * T, Hq] of each row and head; NaN and Inf are off by the whole result."""
    squares = torch.where(torch.isfinite(out), out.double() - exact, exact).square().mean(-1)
    return np.asarray(squares.flatten(0, 1).cpu().numpy())
