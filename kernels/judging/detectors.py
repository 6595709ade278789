"""Detectors: what one kernel's results on one call are found guilty of, and by which measure.

Each sees what the others miss (`docs/numerics.md`):

- probe: a wrong element where the right answer is known (`probes`).
- budget: |err| / bound above 1 somewhere. A bug, certainly; blind to small errors at large n_kv.
- rms: the root mean square of err / E over rows above its limit. Sees errors of many elements that stay
  within the bound; needs distinct logits, since equal ones round alike.
- quadrature: the largest |err| / Q above sqrt(2 ln(2N / alpha)). A suspicion only.
- gain: <err, o> / <o, o>, a common factor, many times smaller than any single element shows.
- lse: |lse error| / its bound above 1.
- trace: what was asked for is not what ran.
- determinism: two runs give different bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from verify.kernels.bits import same_bits
from verify.kernels.budget.arithmetic import FLOAT_TYPES, Arithmetic
from verify.kernels.budget.bound import Budget, budget_ratio, error_budget, relative_error
from verify.kernels.call import AttentionOutput, Call
from verify.kernels.kernel import Kernel
from verify.kernels.plans.plan import RowPlan
from verify.kernels.trace import LaunchTrace

Detector = Literal["probe", "budget", "rms", "quadrature", "gain", "lse", "trace", "determinism"]
DETECTORS: tuple[Detector, ...] = (
    "probe", "budget", "rms", "quadrature", "gain", "lse", "trace", "determinism",
)  # fmt: skip
# A detector that is sure by itself; a suspicion is reported and decides nothing.
SUSPICIONS: frozenset[Detector] = frozenset({"quadrature"})
RMS_LIMIT = 1.3
# Chance of one false suspicion in one call, and deviations of the gain that chance does not reach.
ALPHA = 1e-6
GAIN_SIGMAS = 6.0
# Results below so many times half the smallest number of their type have no gain.
SMALLEST_NUMBERS = 64.0
# Where the budget is vacuous, a relative error above this is a bug all the same.
LARGEST_RELATIVE_ERROR = 1.0 / 8.0


class Measures(NamedTuple):
    """The figures of one call. `nan` where there is nothing to measure.

    budget: largest |err| / bound, vacuous rows left aside; relative: largest error of a row relative to
    sum_j p_j |v_j| where the budget is vacuous; rms and rms_limit; quadrature and its limit; gain and its
    limit; lse: largest |lse error| / bound; nonfinite: elements that are NaN or Inf where none is due;
    vacuous: share of rows; worst: index (b, t, h, column) of the largest |err| / bound.
    """

    budget: float
    relative: float
    rms: float
    rms_limit: float
    quadrature: float
    quadrature_limit: float
    gain: float
    gain_limit: float
    lse: float
    nonfinite: int
    vacuous: float
    worst: tuple[int, int, int, int]


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
) -> Measures:
    """The figures of a result. distinct: no two logits of a row are equal; budget: if it is known already."""
    b = budget or error_budget(call, arithmetic)
    error = result.out.double() - b.out
    bad = ~torch.isfinite(result.out)
    error = torch.where(bad, math.inf, error)
    ratio = budget_ratio(error, b.bound)
    judged = torch.where(b.vacuous[..., None] & ~bad, 0.0, ratio)
    clean = torch.where(bad, 0.0, error)
    relative = torch.where(b.vacuous, relative_error(clean, b.size, b.expected), 0.0)
    # Where budgets say nothing, the place is that of the largest relative error.
    found = judged
    if judged.numel() and float(judged.max()) <= 1 and float(relative.max()) > LARGEST_RELATIVE_ERROR:
        found = torch.where((relative == relative.max())[..., None], clean.abs(), -1.0)
    flat = int(found.argmax()) if judged.numel() else 0
    worst = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), judged.shape))
    rms, rms_limit = _rms(clean, b) if distinct else (math.nan, math.nan)
    used = b.quadrature > 0
    quadrature = budget_ratio(clean, b.quadrature)[used & ~b.vacuous[..., None]]
    count = max(quadrature.numel(), 1)
    gain, gain_limit = _gain(call, clean, b, arithmetic) if distinct else (math.nan, math.nan)
    lse_error = torch.where(result.lse.double() == b.lse, 0.0, result.lse.double() - b.lse)
    return Measures(
        budget=float(judged.max()),
        relative=float(relative.max()),
        rms=rms,
        rms_limit=rms_limit,
        quadrature=float(quadrature.max()) if quadrature.numel() else 0.0,
        quadrature_limit=math.sqrt(2 * math.log(2 * count / ALPHA)),
        gain=gain,
        gain_limit=gain_limit,
        lse=float(budget_ratio(lse_error, b.lse_bound).max()),
        nonfinite=int(bad.sum()),
        vacuous=float(b.vacuous.double().mean()),
        worst=(worst[0], worst[1], worst[2], worst[3]),
    )


def _rms(error: torch.Tensor, b: Budget) -> tuple[float, float]:
    """Root mean square of err / E over rows, and its limit for this number of rows.

    Columns of a row share the roundings of P, so a row counts once. One rounding that dominates a row is
    uniform within its bound: the mean square of a row has a standard deviation of about 1, and the limit
    allows four standard errors of the mean beside RMS_LIMIT.
    """
    used = (b.expected > 0).all(-1) & (b.size > 0).any(-1)
    if not bool(used.any()):
        return math.nan, math.nan
    rows = (error[used] / b.expected[used]).square().mean(-1)
    return math.sqrt(float(rows.mean())), RMS_LIMIT * math.sqrt(1 + 4 / math.sqrt(len(rows)))


def _gain(call: Call, error: torch.Tensor, b: Budget, a: Arithmetic) -> tuple[float, float]:
    """<err, o> / <o, o>, rows weighted by 1 / E^2, and what rounding alone does not exceed.

    An accumulator that truncates shrinks every result alike (`Arithmetic.shrinking`).
    """
    used = (b.expected > 0).all(-1) & (b.size > 0).any(-1)
    # A result of the size of its type's smallest numbers is rounded to one of few, or to 0.
    least = SMALLEST_NUMBERS * FLOAT_TYPES[a.out].tau
    used &= b.out.square().mean(-1).sqrt() >= least
    if not bool(used.any()):
        return math.nan, math.nan
    weight = 1 / b.expected[used].square().mean(-1, keepdim=True)
    out, expected, err = b.out[used], b.expected[used], error[used]
    power = float((weight * out.square()).sum())
    if power == 0:
        return math.nan, math.nan
    gain = float((weight * err * out).sum()) / power
    # <err, o> of a row has the standard deviation |o| |E| if its columns err alike, and that over
    # sqrt(columns) if they do not. They do where values agree: by rho = |o|^2 / |sum p |v||^2.
    rho = (out.norm(dim=-1) / b.size[used].norm(dim=-1)).square().clamp(max=1)
    alike = (rho + (1 - rho) / out.shape[-1]).sqrt()
    each = weight.squeeze(-1) * out.norm(dim=-1) * expected.norm(dim=-1) * alike
    shared = (weight * (b.size[used] * out.abs())).sum(-1)
    deviation = math.sqrt(float(each.square().sum())) / power
    shrinking = max((a.shrinking(n) for n in call.kv_len.unique().tolist()), default=0.0)
    bias = shrinking * float(shared.sum()) / power
    # Of u_p alone, a float32 denominator adds what it rounds: a few u, common to a row.
    return gain, GAIN_SIGMAS * deviation + bias + 8 * a.u


def findings(m: Measures) -> list[Finding]:
    """What the figures amount to."""
    found = []
    if m.nonfinite:
        found.append(Finding("budget", f"{m.nonfinite} elements are NaN or Inf"))
    elif m.budget > 1:
        found.append(Finding("budget", f"error is {m.budget:.3g} times its rounding budget"))
    elif m.relative > LARGEST_RELATIVE_ERROR:
        found.append(
            Finding("budget", f"error is {m.relative:.1%} of sum p|v|: no correct kernel passes 1/8")
        )
    if m.rms > m.rms_limit:
        found.append(Finding("rms", f"rms(err/E) is {m.rms:.3g}, limit {m.rms_limit:.3g}"))
    if m.quadrature > m.quadrature_limit:
        found.append(
            Finding("quadrature", f"largest |err|/Q is {m.quadrature:.3g}, limit {m.quadrature_limit:.3g}")
        )
    if abs(m.gain) > m.gain_limit:
        found.append(Finding("gain", f"common factor 1 {m.gain:+.3g}, limit {m.gain_limit:.2g}"))
    if not m.lse <= 1:
        found.append(Finding("lse", f"lse error is {m.lse:.3g} times its bound"))
    return found


def trace_finding(trace: LaunchTrace, call: Call, asked: Callable[[int], RowPlan]) -> Finding | None:
    """Whether rows of this call ran another plan than `asked` says for their n_kv."""
    for n_kv in call.kv_len.unique().tolist():
        plan = asked(n_kv)
        for path, signature in trace.at(n_kv):
            if path != call.path:
                continue
            if (signature.head_groups, signature.cuts) != (plan.head_groups, plan.cuts):
                return Finding(
                    "trace",
                    f"at n_kv {n_kv} head groups {signature.head_groups} and cuts {signature.cuts} ran,"
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
