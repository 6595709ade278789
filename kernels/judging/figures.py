"""What an error is against its budget, its expected size and its gain: a row and head at a time.

Whoever judges a kernel reduces these figures, over a call, over the windows of a model or over the steps of
a generation; none computes its own. For one row and head, with err = result - o, o the exact result, and the
columns of both, of the bound and of the expected size E (`Budget`):

    ratio      max_i |err_i| / bound_i                 above 1: a bug. Not where the budget is vacuous
    relative   ||err|| / ||sum_j p_j |v_j|| |          above 1/8 where it is vacuous: a bug
    rms        sqrt(mean_i (err_i / E_i)^2)            of a right kernel about 1 at most, over many rows
    gain       <err, o> / <o, o>                       a common factor, 1 + gain
    bias       what roundings that go one way make of the gain, by the kernel's arithmetic;
    falls, rises    how far down and up they may take it, where the arithmetic is only assumed

The gain of several rows is that of all their columns together, sum <err, o> / sum <o, o>: the factor that
fits the result best in least squares. No expected size weighs it, so that two kernels on the same inputs,
and one kernel under two arithmetics, are measured alike, and rows without a budget can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import SMALLEST_SIZE, Budget
from verify.kernels.budget.sums import MOST_EXCUSED, SMALLEST_NUMBERS
from verify.kernels.call import Call
from verify.kernels.numbers import FLOAT_TYPES

# Where the budget is vacuous, a relative error above this is a bug all the same.
LARGEST_RELATIVE_ERROR = MOST_EXCUSED
# Root mean square of error over expected size that many rows of a right kernel do not exceed.
RMS_LIMIT = 1.3
# Deviations of the gain that chance does not reach.
GAIN_SIGMAS = 6.0
# Beside chance and bias: what a denominator in float32 may be off by, in common, in units of u.
GAIN_UNITS = 8
# From this share of the square error on, a gain is what is wrong, and not a shadow of something else.
ALIKE = 0.5
# An error of up to so many times its expected root mean square is of that size.
EXPECTED_TIMES = 8.0
SMALLEST_SQUARE = 1e-300


class RowFigures(NamedTuple):
    """Figures of each row and head, [B, T, Hq], float64 but for the last two. Elements that are NaN or Inf
    count in `nonfinite` alone."""

    # Largest |err| / bound; 0 where the budget is vacuous.
    ratio: torch.Tensor
    # ||err|| / ||sum p|v|||; 0 where few digits are due, and where the budget is not vacuous.
    relative: torch.Tensor
    # Root of the mean of (err / E)^2 over columns; NaN where no error is expected: an empty row, V of zeros.
    rms: torch.Tensor
    # <err, o> / <o, o>, 0 where o is 0.
    gain: torch.Tensor
    # What roundings of one direction make of it, by the arithmetic; and down and up, where it is assumed.
    bias: torch.Tensor
    falls: torch.Tensor  # downwards
    rises: torch.Tensor  # upwards
    # <o, o>: by it gains of rows are weighed together.
    power: torch.Tensor
    # Columns that are NaN or Inf, int64.
    nonfinite: torch.Tensor
    # Whether the bound says nothing, bool.
    vacuous: torch.Tensor

    def of_rows(self, rows: slice) -> RowFigures:
        """Those of some rows of every sequence."""
        return RowFigures._make(x[:, rows] for x in self)

    @property
    def severity(self) -> torch.Tensor:
        """How many times what is allowed each row errs by, infinite for NaN and Inf: to find the worst."""
        times = torch.maximum(self.ratio, self.relative / LARGEST_RELATIVE_ERROR)
        return torch.where(self.nonfinite > 0, math.inf, times)


def row_figures(error: torch.Tensor, budget: Budget) -> RowFigures:
    """The figures of an error, result - exact, [B, T, Hq, Dv] in float64, NaN and Inf where the result is."""
    bad = ~torch.isfinite(error)
    error, nonfinite = torch.where(bad, 0.0, error), bad.sum(-1)
    ratio = torch.where(budget.vacuous, 0.0, budget_ratio(error, budget.bound).amax(-1))
    relative = torch.where(budget.vacuous, relative_error(error, budget.size, by_chance(budget)), 0.0)
    gain, power = gain_of(error, budget.out)
    return RowFigures(
        ratio=ratio,
        relative=relative,
        rms=_rms(error, budget),
        gain=gain,
        bias=budget.bias,
        falls=budget.falls,
        rises=budget.rises,
        power=power,
        nonfinite=nonfinite,
        vacuous=budget.vacuous,
    )


def element_ratios(error: torch.Tensor, budget: Budget) -> torch.Tensor:
    """|err| / bound of every element [B, T, Hq, Dv]; infinite for NaN and Inf, else 0 where it is vacuous."""
    ratio = budget_ratio(error, budget.bound)
    return torch.where(budget.vacuous[..., None] & torch.isfinite(error), 0.0, ratio)


def _rms(error: torch.Tensor, budget: Budget) -> torch.Tensor:
    expected = budget.expected > 0
    square = torch.where(expected, error / budget.expected, 0.0).square().sum(-1) / expected.sum(-1)
    return torch.where((budget.size > 0).any(-1), square, math.nan).sqrt()


def budget_ratio(error: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """|error| / bound, where 0 / 0 is 0, and a NaN or an Inf is infinitely wrong."""
    error = error.abs()
    ratio = torch.where(error == 0, 0.0, error / bound)
    return ratio.nan_to_num(nan=math.inf, posinf=math.inf)


def zeroed_rows(error: torch.Tensor, budget: Budget, call: Call, arithmetic: Arithmetic) -> torch.Tensor:
    """Rows [B, T, Hq] whose result is exactly 0 in every column, where not all weights can have underflowed.

    Weights sum to one, so something was not added up. A bound may be wide enough for it, where logits are
    large: a float16 q is off by nats there.
    """
    zero = (error == -budget.out).all(-1)
    if not bool(zero.any()):
        return zero
    for b, rows in enumerate(call.kv_len.tolist()):
        n = max(rows, default=0)
        # P loses at most tau_p a key (`Arithmetic.tau_p`), the result half its smallest number.
        lost = n * arithmetic.tau_p * _largest(call.v[b, : max(n, 1)])
        least = 2 * lost + SMALLEST_NUMBERS * FLOAT_TYPES[arithmetic.out].tau
        zero[b] &= budget.out[b].abs().amax(-1) > least
    return zero


def by_chance(budget: Budget) -> torch.Tensor:
    """The expected size of an error without what float16 sums lose one way, [..., Dv]: that is no chance, and
    grows with the keys until nothing is left of a result."""
    return (budget.expected.square() - budget.stagnation.square()).clamp(min=0).sqrt()


def relative_error(error: torch.Tensor, size: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """||error|| / ||sum p|v||| of each row, [..., D] to [...]: what is judged where a budget is vacuous.

    0 where a right kernel may have few digits or none: where the sum is beyond float32's normal numbers (all
    weight on a sink), or the error is of the size that is expected (all weight on keys whose values are 0,
    beside which the other weights underflow in P's type). expected: by chance (`by_chance`).
    """
    norm, size = error.norm(dim=-1), size.norm(dim=-1)
    few = (size < SMALLEST_SIZE) | (norm <= EXPECTED_TIMES * expected.norm(dim=-1))
    return torch.where(few, 0.0, norm / size.clamp(min=SMALLEST_SIZE))


def gain_of(
    error: torch.Tensor, exact: torch.Tensor, dim: int | tuple[int, ...] = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """<error, exact> / <exact, exact> over some dimensions, 0 where exact is 0; and <exact, exact>."""
    power = exact.square().sum(dim)
    return (error * exact).sum(dim) / power.clamp(min=SMALLEST_SQUARE), power


def relative_rms(error: torch.Tensor, exact: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """||error|| / ||exact|| over some dimensions."""
    power = exact.square().sum(dim).clamp(min=SMALLEST_SQUARE)
    return (error.square().sum(dim) / power).sqrt()


def pooled_gain(rows: torch.Tensor, power: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """Gains, or biases, of rows as that of their columns together. Rows of which no gain can be told
    (an infinite bias) count nothing; 0 where nothing is left."""
    weight = torch.where(torch.isfinite(rows), power, 0.0)
    shares = torch.where(weight > 0, rows, 0.0) * weight
    return shares.sum(dim) / weight.sum(dim).clamp(min=SMALLEST_SQUARE)


def pooled_rms(rows: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """The root mean square of rows' `rms`, of those that have one; NaN where none has."""
    square = rows.square()
    measured = ~torch.isnan(square)
    return (torch.where(measured, square, 0.0).sum(dim) / measured.sum(dim)).sqrt()


def rms_limit(rows: int) -> float:
    """What the pooled rms of a right kernel does not exceed.

    Columns of a row share the roundings of P, so a row counts once. One rounding that dominates a row is
    uniform within its bound: the mean square of a row has a standard deviation of about 1, and the limit
    allows four standard errors of the mean beside RMS_LIMIT.
    """
    return RMS_LIMIT * math.sqrt(1 + 4 / math.sqrt(max(rows, 1)))


def gain_limit(deviation: float, bias: float, u: float) -> float:
    """What the gain of a right kernel does not exceed: chance, roundings of one direction (`bias`, or `falls`
    or `rises` by the gain's sign), and of u_p alone a float32 denominator adds what it rounds, a few u,
    common to a row."""
    return GAIN_SIGMAS * deviation + bias + GAIN_UNITS * u


def smallest_squares(exact: torch.Tensor, out: str) -> torch.Tensor:
    """What a result of type `out` cannot show: the square of a quarter of its step at each row's root mean
    square. exact [..., Dv] float64 -> [...]."""
    kind = FLOAT_TYPES[out]
    size = exact.square().mean(-1).sqrt()
    exponent = torch.frexp(size.clamp(min=2.0**-1000)).exponent.double() - 1
    return (torch.exp2((exponent - kind.digits).clamp(min=kind.least)) / 4).square()


def another_origin(call: Call, lse: torch.Tensor, budget: Budget) -> bool:
    """Whether an lse [B, T, Hq] is off as that of ALiBi slopes which count from another key, and no more.

    Then it differs from the exact one by slope * c, c the same for all heads of a row, and the weights are
    the same. Merged with parts of the same row it does no harm; it is not comparable with another kernel's.
    """
    if call.alibi_slopes is None or call.alibi_slopes.unique().numel() < 2:
        return False
    off = torch.where(lse.double() == budget.lse, 0.0, lse.double() - budget.lse)
    if not bool(torch.isfinite(off).all()) or bool((off.abs() <= budget.lse_bound).all()):
        return False
    slopes = call.alibi_slopes.double()
    ends = torch.stack([(off - budget.lse_bound) / slopes, (off + budget.lse_bound) / slopes])
    return bool((ends.amin(0).amax(-1) <= ends.amax(0).amin(-1)).all())


# The sentences. Each is None where nothing is wrong; where: " at ..." or ", on ...", after what is wrong.


def budget_fault(nonfinite: int, ratio: float, relative: float, where: str = "") -> str | None:
    """What is wrong with single elements or rows."""
    if nonfinite:
        return f"NaN or Inf{where}" if where else f"{nonfinite} elements are NaN or Inf"
    if ratio > 1:
        return f"error is {ratio:.3g} times its rounding budget{where}"
    if relative > LARGEST_RELATIVE_ERROR:
        return f"error is {relative:.1%} of sum p|v|{where}: no correct kernel exceeds 1/8"
    return None


def zero_fault(zeroed: int) -> str | None:
    """What is wrong with rows in which nothing was added up."""
    return f"{zeroed} rows of heads are exact zeros where numbers are due" if zeroed else None


def lse_fault(ratio: float, where: str = "") -> str | None:
    """A log-sum-exp beyond its bound."""
    return f"lse error is {ratio:.3g} times its bound{where}" if ratio > 1 else None


def lse_ratio(call: Call, lse: torch.Tensor, budget: Budget) -> torch.Tensor:
    """|lse error| / bound of each row and head [B, T, Hq].

    NaN where ALiBi slopes count from another key, which is no fault.
    """
    if another_origin(call, lse, budget):
        return torch.full_like(budget.lse, torch.nan)
    error = torch.where(lse.double() == budget.lse, 0.0, lse.double() - budget.lse)
    return budget_ratio(error, budget.lse_bound)


def rms_fault(rms: float, limit: float, where: str = "") -> str | None:
    """Errors that are within the budget one by one, and too large together."""
    if not rms > limit:
        return None
    return (
        f"errors are {rms:.3g} times their expected size{where} (limit {limit:.3g}):"
        " less precise than the kernel says it is"
    )


def gain_fault(
    gain: float, limit: float, relative_rms: float = math.nan, where: str = "", sigmas: float = math.nan
) -> str | None:
    """A common factor. relative_rms: of the whole error, of which the gain may be a shadow only; sigmas: its
    distance from 0 in standard errors, where there is one."""
    if not abs(gain) > limit:
        return None
    shadow = gain**2 <= ALIKE * relative_rms**2
    said = "results are off, on average by a factor" if shadow else "every result is off by a common factor"
    chance = "" if math.isnan(sigmas) else f"{abs(sigmas):.0f} standard errors; "
    return f"{said} of 1 {gain:+.3g}{where} ({chance}rounding explains {limit:.1g})"


def apart_fault(shift: float, limit: float, head: int) -> str | None:
    """A common factor of one head's results that no other head has. shift: its gain less theirs."""
    if not abs(shift) > limit:
        return None
    return (
        f"head {head} is off by a common factor of 1 {shift:+.3g} that no other head has"
        f" (chance and rounding explain {limit:.1g})"
    )


def bias_said(gain: float, stated_limit: float, limit: float, u_out: float, where: str = "") -> str | None:
    """A gain that is no fault: beyond chance and what is stated, within what an assumed arithmetic may do.

    u_out: unit roundoff of the result's type, half of which is half a step of it relative to a number.
    """
    if not stated_limit < abs(gain) <= limit:
        return None
    below = f"below half a step of its result, {u_out / 2:.2g}"
    if abs(gain) > u_out / 2:
        below = f"which roundings that go one way may make, up to {limit:.2g}"
    return f"biased by {gain:+.2g}{where}, {below}: no fault"


def shared_fault(faults: Sequence[str]) -> str:
    """What is said of faults that a candidate shares with its baseline, whose bits it has.

    faults: the baseline's, as sentences that begin with "both".
    """
    return f"{faults[0]}, bit for bit the same: not this change"


def shared_overflow(of_candidate: int, of_baseline: int) -> str:
    """What is said where a candidate has NaN or Inf in such elements alone as its baseline has it in."""
    return (
        f"both: {of_candidate} elements are NaN or Inf, all of them among the baseline's {of_baseline}:"
        " not this change"
    )


def graveness(nonfinite: int, ratio: float, relative: float) -> tuple[bool, float]:
    """What the worst of several faults is the largest by: NaN first, then times what is allowed."""
    return nonfinite > 0, max(ratio, relative / LARGEST_RELATIVE_ERROR)


def _largest(v: torch.Tensor) -> torch.Tensor:
    """The largest |v|, float64; 0 where a call has no keys at all."""
    return v.abs().amax().double() if v.numel() else v.new_zeros((), dtype=torch.float64)
