"""Detectors: what one kernel's results on one call are found guilty of, and by which measure.

Each sees what the others miss (`docs/numerics.md`):

- probe: a wrong element where the right answer is known (`probes`).
- budget: |err| / bound above 1 somewhere. A bug, certainly; blind to small errors at large n_kv.
- rms: the root mean square of err / E over rows above its limit. Sees errors of many elements that stay
  within the bound; needs distinct logits, since equal ones round alike.
- quadrature: the largest |err| / Q above sqrt(2 ln(2N / alpha)). A suspicion only.
- gain: <err, o> / <o, o>, a common factor, many times smaller than any single element shows, beyond what
  roundings that all go one way can make of it; of all rows together, and of each head's; and of one head,
  beyond what chance makes of it, where no other has it (`apart`).
- bias: a gain that they can make, of an arithmetic that is not stated. Said, no fault.
- lse: |lse error| / its bound above 1.
- contract: an lse of ALiBi slopes that count from another key. Said, no fault.
- limit: what float16 sums cannot do, and a stated arithmetic that has them does not (`emulation`). Said.
- trace: what was asked for is not what ran.
- determinism: two runs give different bits.
- law: a law of plans (`verify.laws`) does not hold of the rule that cuts calls up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from verify.kernels.bits import same_bits
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import Budget, error_budget
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.judging.apart import HeadApart, head_apart
from verify.kernels.judging.figures import (
    GAIN_UNITS,
    LARGEST_RELATIVE_ERROR,
    RowFigures,
    another_origin,
    apart_fault,
    bias_said,
    budget_fault,
    budget_ratio,
    by_chance,
    element_ratios,
    gain_fault,
    gain_limit,
    pooled_gain,
    pooled_rms,
    rms_fault,
    rms_limit,
    row_figures,
    zero_fault,
    zeroed_rows,
)
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.plans.plan import RowPlan
from verify.kernels.trace import Launched

Detector = Literal[
    "probe", "budget", "rms", "quadrature", "gain", "bias", "lse", "contract", "limit", "trace",
    "determinism", "law",
]  # fmt: skip
DETECTORS: tuple[Detector, ...] = (
    "probe", "budget", "rms", "quadrature", "gain", "bias", "lse", "contract", "limit", "trace",
    "determinism", "law",
)  # fmt: skip
# A detector that is sure by itself; a suspicion is reported and decides nothing.
SUSPICIONS: frozenset[Detector] = frozenset({"quadrature", "bias", "contract", "limit"})
# Chance of one false suspicion in one call.
ALPHA = 1e-6


class Measures(NamedTuple):
    """The figures of one call. `nan` where there is nothing to measure."""

    budget: float  # largest |err| / bound, vacuous rows left aside
    relative: float  # largest error of a row over sum_j p_j |v_j|, where the budget is vacuous
    rms: float  # error over its expected size
    rms_limit: float  # what rounding alone does not exceed
    quadrature: float  # error over the root of the sum of squared bounds
    quadrature_limit: float  # likewise
    gain: float  # a common factor is 1 + gain
    gain_limit: float  # what rounding alone does not exceed
    gain_stated: float  # what chance and the stated arithmetic explain of it
    head_gain: float  # the gain of one head's rows, of the head whose gain is farthest beyond its limit
    head_gain_limit: float  # what rounding alone does not exceed
    head: int  # which head that is
    lse: float  # largest |lse error| / bound
    nonfinite: int  # elements that are NaN or Inf where none is due
    vacuous: float  # share of rows whose bound says nothing
    worst: tuple[int, int, int, int]  # (b, t, h, column) of the largest |err| / bound
    u_out: float  # unit roundoff of the result's type
    # The lse is off as ALiBi slopes that count from another key make it, and no more.
    another_origin: bool = False
    zeroed: int = 0  # rows of heads that are exact zeros where numbers are due
    apart: float = math.nan  # the gain, less the others', of the head that is farthest from them
    apart_limit: float = math.nan  # what it does not exceed; NaN where heads are not alike
    apart_head: int = 0  # which head that is


class Finding(NamedTuple):
    """One detector's objection, in words."""

    detector: Detector
    said: str


def measure(
    call: Call,
    result: AttentionOutput,
    arithmetic: Arithmetic,
    *,
    distinct: bool,
    budget: Budget | None = None,
    heads_alike: bool = False,
) -> Measures:
    """The figures of a result. distinct: no two logits of a row are equal; budget: if it is known already;
    heads_alike: the heads' numbers were drawn alike, and one launch or launches of one kind computed all."""
    b = budget or error_budget(call, arithmetic)
    error = result.out.double() - b.out
    rows, ratio = row_figures(error, b), element_ratios(error, b)
    error = torch.where(torch.isfinite(error), error, 0.0)
    # Where budgets say nothing, the place is that of the largest relative error.
    found = ratio
    if ratio.numel() and float(ratio.max()) <= 1 and float(rows.relative.max()) > LARGEST_RELATIVE_ERROR:
        found = torch.where((rows.relative == rows.relative.max())[..., None], error.abs(), -1.0)
    flat = int(found.argmax()) if ratio.numel() else 0
    worst = tuple(int(i) for i in np.unravel_index(flat, ratio.shape))
    quadrature = budget_ratio(error, b.quadrature)[(b.quadrature > 0) & ~b.vacuous[..., None]]
    measured = int((~torch.isnan(rows.rms)).sum())
    gain, of_heads = _gains(rows, b, arithmetic) if distinct else (_UNTOLD, [_UNTOLD])
    head = _farthest(of_heads)
    apart = None
    if heads_alike and distinct and not bool(rows.nonfinite.any()):
        apart = _apart(call, of_heads, arithmetic)
    lse_error = torch.where(result.lse.double() == b.lse, 0.0, result.lse.double() - b.lse)
    return Measures(
        budget=float(ratio.max()),
        relative=float(rows.relative.max()),
        rms=float(pooled_rms(rows.rms, (0, 1, 2))) if distinct else math.nan,
        rms_limit=rms_limit(measured) if distinct and measured else math.nan,
        quadrature=float(quadrature.max()) if quadrature.numel() else 0.0,
        quadrature_limit=math.sqrt(2 * math.log(2 * max(quadrature.numel(), 1) / ALPHA)),
        gain=gain.gain,
        gain_limit=gain.limit,
        gain_stated=gain.stated,
        head_gain=of_heads[head].gain,
        head_gain_limit=of_heads[head].limit,
        head=head,
        lse=float(budget_ratio(lse_error, b.lse_bound).max()),
        nonfinite=int(rows.nonfinite.sum()),
        vacuous=float(b.vacuous.double().mean()),
        worst=(worst[0], worst[1], worst[2], worst[3]),
        u_out=FLOAT_TYPES[arithmetic.out].u,
        another_origin=another_origin(call, result.lse, b),
        zeroed=int(zeroed_rows(result.out.double() - b.out, b, call, arithmetic).sum()),
        apart=math.nan if apart is None else apart.shift,
        apart_limit=math.nan if apart is None else apart.limit,
        apart_head=0 if apart is None else apart.head,
    )


class _Gain(NamedTuple):
    """A gain, the deviation that chance gives it, what rounding does not exceed, what it does not as is
    stated, and how far up roundings of one direction may take it; NaN where it is not told."""

    gain: float
    deviation: float
    limit: float
    stated: float
    rises: float


_UNTOLD = _Gain(*[math.nan] * 5)


def _farthest(of_heads: Sequence[_Gain]) -> int:
    """The head whose gain is farthest beyond its limit."""
    told = [h for h, each in enumerate(of_heads) if not math.isnan(each.gain)]
    return max(told, key=lambda h: abs(of_heads[h].gain) / of_heads[h].limit, default=0)


def _apart(call: Call, of_heads: Sequence[_Gain], a: Arithmetic) -> HeadApart | None:
    """The head that is farthest from the others; its limit allows for what they all share, for steps of the
    result, and where the maximum may lag for the rounding of the largest P, which is then 1 in some heads and
    not in others. None where heads have sinks or slopes of their own."""
    if call.sinks is not None or call.alibi_slopes is not None:
        return None
    gains, deviations = (torch.tensor([each[i] for each in of_heads], dtype=torch.float64) for i in range(2))
    found = head_apart(gains, deviations)
    if found is None:
        return None
    least = max(abs(found.centre), FLOAT_TYPES[a.out].u / 2, GAIN_UNITS * a.u)
    if a.stale_maximum or not a.stated:
        # Either way, but not what is truncated: that they share.
        least = max(least, of_heads[found.head].rises)
    return found._replace(limit=max(found.limit, least))


def _gains(rows: RowFigures, b: Budget, a: Arithmetic) -> tuple[_Gain, list[_Gain]]:
    """The gain of all rows, and that of each head's, of those rows of which one can be told."""
    used = torch.isfinite(rows.bias) & (rows.power > 0)  # [B, T, H]
    power = torch.where(used, rows.power, 0.0)
    # Of sums that are only assumed to stagnate no more is excused than their bias has.
    out, expected = b.out.norm(dim=-1), (b.expected if a.stated else by_chance(b)).norm(dim=-1)
    # <err, o> of a row has the standard deviation |o| |E| if its columns err alike, and that over
    # sqrt(columns) if they do not. They do where values agree: by rho = |o|^2 / |sum p |v||^2.
    rho = (out / b.size.norm(dim=-1)).square().clamp(max=1)
    alike = (rho + (1 - rho) / b.out.shape[-1]).sqrt()
    chance = torch.where(used, out * expected * alike, 0.0).square()

    def by_head(x: torch.Tensor) -> torch.Tensor:
        """[heads + 1]: sums over the rows of each head, and of all."""
        of_heads = x.sum((0, 1))
        return torch.cat((of_heads, of_heads.sum()[None]))

    def pooled(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((pooled_gain(x, power, (0, 1)), pooled_gain(x, power, (0, 1, 2))[None]))

    of_each = by_head(power)
    gain, rises = pooled(rows.gain), pooled(rows.rises)
    deviation = by_head(chance).sqrt() / of_each
    most, bias = torch.where(gain > 0, rises, pooled(rows.falls)), pooled(rows.bias)
    figures = torch.stack((of_each, gain, deviation, most, bias, rises), 1).tolist()
    found = [
        _UNTOLD
        if power == 0
        else _Gain(
            gain=gain,
            deviation=deviation,
            limit=gain_limit(deviation, most, a.u),
            stated=gain_limit(deviation, bias, a.u),
            rises=rises,
        )
        for power, gain, deviation, most, bias, rises in figures
    ]
    return found[-1], found[:-1]


def findings(m: Measures) -> list[Finding]:
    """What the figures amount to."""
    found = []
    said: dict[Detector, str | None] = {
        "budget": budget_fault(m.nonfinite, m.budget, m.relative) or zero_fault(m.zeroed),
        "rms": rms_fault(m.rms, m.rms_limit),
        "gain": gain_fault(m.gain, m.gain_limit)
        or gain_fault(m.head_gain, m.head_gain_limit, where=f", on head {m.head}")
        or apart_fault(m.apart, m.apart_limit, m.apart_head),
        "bias": bias_said(m.gain, m.gain_stated, m.gain_limit, m.u_out),
    }
    if m.quadrature > m.quadrature_limit:
        said["quadrature"] = f"largest |err|/Q is {m.quadrature:.3g}, limit {m.quadrature_limit:.3g}"
    if m.another_origin:
        said["contract"] = (
            "lse: ALiBi counts from another key than the row's last: results are right, its lse cannot be"
            " compared with another kernel's"
        )
    elif not m.lse <= 1:
        said["lse"] = f"lse error is {m.lse:.3g} times its bound"
    for detector in DETECTORS:
        if sentence := said.get(detector):
            found.append(Finding(detector, sentence))
    return found


def trace_finding(launched: Launched, asked: Callable[[int], RowPlan]) -> Finding | None:
    """Whether rows of this call ran another plan than `asked` says for their n_kv."""
    for _, n_kv, ran in sorted(launched.rows):
        plan = asked(n_kv)
        if (ran.head_groups, ran.cuts) != (plan.head_groups, plan.cuts):
            return Finding(
                "trace",
                f"at n_kv {n_kv} head groups {ran.head_groups} and cuts {ran.cuts} ran,"
                f" asked for {plan.head_groups} and {plan.cuts}",
            )
    return None


def determinism_finding(
    kernel: Kernel, call: Call, first: AttentionOutput, *, runs: int = 2
) -> Finding | None:
    """Whether running the call again gives the same bits, NaN included."""
    for run in range(runs):
        again = kernel.run(call)
        for name, x, y in (("out", first.out, again.out), ("lse", first.lse, again.lse)):
            if not same_bits(x, y):
                return Finding("determinism", f"run {run + 2} of the same call gives another {name}")
    return None
