"""How laws compare: each result with its own budget, two results with both, and bits with bits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from verify.kernels.bits import different
from verify.kernels.budget.bound import Budget, error_budget
from verify.kernels.budget.merge_bound import BoundedPart
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.judging.figures import (
    another_origin,
    budget_fault,
    budget_ratio,
    row_figures,
    zero_fault,
    zeroed_rows,
)
from verify.kernels.kernel import Kernel
from verify.kernels.merge import Part
from verify.laws.law import LawBroken

# Of the budgets themselves: float64 where they are computed, and where exact results of an identity are.
SLACK = 1e-9


class Seen(NamedTuple):
    """A result in float64 and what it may be off by: out, bound [B, T, Hq, Dv]; lse, lse_bound [B, T, Hq]."""

    out: torch.Tensor
    lse: torch.Tensor
    bound: torch.Tensor
    lse_bound: torch.Tensor


def seen(kernel: Kernel, call: Call, result: AttentionOutput | None = None) -> Seen:
    """The kernel's result, if need be a new one, with the budget of its arithmetic."""
    result = result or kernel.run(call)
    budget = error_budget(kernel.held(call), kernel.arithmetic_of(call))
    _not_far(kernel, call, result.out.double() - budget.out, budget)
    lse = budget.lse if another_origin(call, result.lse, budget) else result.lse.double()
    return Seen(result.out.double(), lse, budget.bound, budget.lse_bound)


def against_exact(
    kernel: Kernel, call: Call, result: AttentionOutput | None = None, *, out: bool = True, lse: bool
) -> float:
    """The margin of a kernel's result to the oracle's; if need be of a new one."""
    result = result or kernel.run(call)
    budget = error_budget(kernel.held(call), kernel.arithmetic_of(call))
    _not_far(kernel, call, result.out.double() - budget.out, budget)
    margin = _judge("out against exact", result.out.double(), budget.out, budget.bound) if out else 0.0
    if lse and not another_origin(call, result.lse, budget):
        margin = max(margin, _judge("lse against exact", result.lse.double(), budget.lse, budget.lse_bound))
    return margin


def agree(what: str, a: Seen, b: Seen, *, lse: bool) -> float:
    """The margin of two results that exact arithmetic would make equal: each may err by its own budget."""
    bound = (a.bound + b.bound) * (1 + SLACK) + SLACK * 2.0**-24 * (a.out.abs() + b.out.abs())
    margin = _judge(f"{what}: out", a.out, b.out, bound)
    if lse:
        both = (a.lse_bound + b.lse_bound) * (1 + SLACK) + SLACK * (1 + b.lse.abs().nan_to_num(posinf=0.0))
        margin = max(margin, _judge(f"{what}: lse", a.lse, b.lse, both))
    return margin


def part_within(what: str, got: Part, due: BoundedPart) -> float:
    """The margin of a merged part."""
    margin = _judge(f"{what}: out", got.out.double(), due.out, due.bound * (1 + SLACK))
    return max(margin, _judge(f"{what}: lse", got.lse.double(), due.lse, due.lse_bound * (1 + SLACK)))


def no_bit_moves(
    what: str, a: AttentionOutput | Part, b: AttentionOutput | Part, *, lse: bool = True
) -> float:
    """0 where all numbers are the same (`verify.kernels.bits`). Raises LawBroken otherwise."""
    pairs = [("out", a.out, b.out), ("lse", a.lse, b.lse)]
    for name, x, y in pairs if lse else pairs[:1]:
        wrong = different(x, y)
        if bool(wrong.any()):
            at = tuple(wrong.nonzero()[0].tolist())
            raise LawBroken(
                f"{what}: {name} {list(at)}: expected the same bits, got {float(x[at]):.9g} and"
                f" {float(y[at]):.9g} ({int(wrong.sum())} of {wrong.numel()} differ)"
            )
    return 0.0


def _not_far(kernel: Kernel, call: Call, error: torch.Tensor, budget: Budget) -> None:
    """Where a bound says nothing (`vacuous`), no right kernel errs by more than a share of sum p|v|."""
    relative = row_figures(error, budget).relative
    if not relative.numel():
        return
    at = [int(i) for i in torch.unravel_index(relative.argmax(), relative.shape)]
    if fault := budget_fault(0, 0.0, float(relative.max()), f" at {at}"):
        raise LawBroken(f"out: {fault}")
    held, arithmetic = kernel.held(call), kernel.arithmetic_of(call)
    if fault := zero_fault(int(zeroed_rows(error, budget, held, arithmetic).sum())):
        raise LawBroken(f"out: {fault}")


def _judge(what: str, got: torch.Tensor, due: torch.Tensor, bound: torch.Tensor) -> float:
    error = torch.where(got == due, 0.0, got - due)
    ratio = budget_ratio(error, bound)
    if not ratio.numel():
        return 0.0
    worst = float(ratio.max())
    if worst > 1:
        at = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
        raise LawBroken(
            f"{what} {list(at)}: expected {float(due[at]):.9g} within {float(bound[at]):.3g},"
            f" got {float(got[at]):.9g}: {worst:.3g} times the tolerance"
        )
    return worst
