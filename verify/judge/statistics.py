"""Paired statistics of two arms: how far each is from exact, and how sure that is.

theta is the mean over tokens of ln(KLD_candidate / KLD_reference), both against `exact`; the distance ratio
is exp(theta / 2), since a KLD is quadratic in a small error. The mean of the logarithm is robust where a few
tokens hold most of the divergence, and symmetric where the two kernels are exchangeable.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from verify.judge.chances import shift_that_exceeds, student_quantile

# The one pre-declared test: two-sided, at 99.9 %.
CONFIDENCE = 0.999
POWER = 0.9
# Tokens of one block: at least so many, and so many times the lag from which on the series' autocorrelation
# is below LITTLE. Of blocks of one lag the standard error is 0.76 of the true one.
BLOCK_TOKENS, LAGS, LITTLE = 16, 5, 0.1
# Blocks of a window are not independent: their standard error is widened by this, and few windows say
# nothing about other texts.
BLOCK_WIDENING = 1.2
WINDOWS_FOR_T = 8
# Of fewer samples there is no interval: their spread is not known.
FEWEST_BLOCKS = 8
# Standard deviation of one token's theta, as if tokens were independent, between kernels that differ by the
# rounding of P: SmolLM2, 64 windows of 512 (`benchmarks/results/distances.json`).
TYPICAL_DEVIATION = 1.25
# A difference of ln PPL is one beyond what chance does once in a million.
DIFFERENCE_CHANCE = 1e-6
# Divergences are computed in float64 from float32 logits: below this they are its rounding.
SMALLEST_KLD = 1e-15
# From here on exp(theta / 2) is no number.
_LARGEST = 1400.0
# An interval of theta that is wider says nothing: a factor of 10,000 between the limits of a distance ratio.
WIDEST = 4 * math.log(100)


class Interval(NamedTuple):
    """A mean with its interval."""

    mean: float  # of the samples
    low: float  # of the interval
    high: float  # of the interval
    se: float  # standard error
    degrees: int  # of freedom
    scope: str  # what the interval speaks about


class DistanceRatio(NamedTuple):
    """Distance of the candidate to exact over that of the reference, with its interval at CONFIDENCE.

    Where there are too few samples for an interval, `high` and `detectable` are infinite.
    """

    ratio: float  # exp(theta / 2)
    low: float  # of its interval
    high: float  # of its interval
    detectable: float  # smallest ratio that would have been told from 1 with probability POWER
    scope: str  # what the interval speaks about
    theta: float = math.nan  # 2 ln ratio
    theta_se: float = math.nan  # its standard error
    degrees: int = 0  # of freedom
    energy_ratio: float = math.nan  # of the root mean divergences, which few tokens may hold

    @property
    def few_tokens_hold_it(self) -> bool:
        """Whether the mean divergences say something else than the typical token does."""
        apart = abs(math.log(self.energy_ratio / self.ratio)) if self.energy_ratio > 0 else 0.0
        return apart > math.log(2)


class PairedDifference(NamedTuple):
    """mean of nll_candidate - nll_reference, its standard error over blocks of tokens, and how many they are
    (0: too few; then tokens are taken as independent)."""

    mean: float
    se: float
    blocks: int = 0

    @property
    def beyond_chance(self) -> bool:
        """Whether it differs from 0 by more than chance does once in a million: never on few blocks."""
        if self.blocks < FEWEST_BLOCKS:
            return False
        return abs(self.mean) > float(student_quantile(1 - DIFFERENCE_CHANCE / 2, self.blocks - 1)) * self.se


def window_interval(
    values: np.ndarray, *, like: np.ndarray | None = None, confidence: float = CONFIDENCE
) -> Interval:
    """Interval of the mean of values [windows, tokens].

    Under WINDOWS_FOR_T windows: Student's t over blocks of tokens, widened, about this text only; from there
    on: t over window means. like [windows, tokens]: a series whose autocorrelation says how long blocks must
    be; default: the values. (A bootstrap over windows covers less, and less than it says: at 20 windows of
    heavy-tailed data 98 % of a nominal 99.9 %. All of it: `tests/verify/judge/test_statistics.py`.)
    """
    if values.shape[0] < WINDOWS_FOR_T:
        length = block_length(values if like is None else like)
        blocks = np.concatenate([_block_means(row, length) for row in values])
        return _t_interval(blocks, float(values.mean()), BLOCK_WIDENING, "this text only", confidence)
    means = values.mean(1)
    return _t_interval(means, float(means.mean()), 1.0, "texts like this one", confidence)


def block_length(series: np.ndarray) -> int:
    """Tokens of a block of a series [windows, tokens]: LAGS times the first lag of little autocorrelation.

    At least BLOCK_TOKENS; a window at most.
    """
    tokens = series.shape[1]
    centred = series - series.mean()
    power = float(np.square(centred).mean())
    if not power > 0:
        return min(BLOCK_TOKENS, tokens)
    for lag in range(1, tokens):
        # Without a table of the products, of which a long text has hundreds.
        products = float(np.einsum("wt,wt->", centred[:, lag:], centred[:, :-lag]))
        if products / (len(series) * (tokens - lag)) < LITTLE * power:
            return min(max(BLOCK_TOKENS, LAGS * lag), tokens)
    return tokens


def ratio_of_samples(log_squares: np.ndarray, scope: str = "these inputs") -> DistanceRatio:
    """Distance ratio from independent samples of ln(square error / square error of the reference)."""
    return _ratio(_t_interval(log_squares, float(log_squares.mean()), 1.0, scope))


def distance_ratio(kld: np.ndarray, kld_reference: np.ndarray) -> DistanceRatio:
    """Distance ratio of two arms from their divergences to exact, both [windows, tokens]."""
    mine, its = (np.log(np.maximum(x, SMALLEST_KLD)) for x in (kld, kld_reference))
    energies = [max(float(x.mean()), SMALLEST_KLD) for x in (kld, kld_reference)]
    found = _ratio(window_interval(mine - its, like=its))
    return found._replace(energy_ratio=math.sqrt(energies[0] / energies[1]))


def expected_half_width(windows: int, tokens: int, deviation: float = TYPICAL_DEVIATION) -> float:
    """By which factor, less 1, the interval of a distance ratio will lie around it.

    windows, tokens: what is measured; deviation: of one token's theta. Infinite where there will be none.
    """
    few = windows < WINDOWS_FOR_T
    samples = windows * max(round(tokens / windows / BLOCK_TOKENS), 1) if few else windows
    if samples < FEWEST_BLOCKS:
        return math.inf
    se = (BLOCK_WIDENING if few else 1.0) * deviation / math.sqrt(tokens)
    reach = float(student_quantile((1 + CONFIDENCE) / 2, samples - 1)) * se / 2
    return math.expm1(reach) if reach < _LARGEST / 2 else math.inf


def deviation_of(distance: DistanceRatio, windows: int, tokens: int) -> float:
    """Standard deviation of one token's theta, as a run of some windows shows it."""
    widening = BLOCK_WIDENING if windows < WINDOWS_FOR_T else 1.0
    return distance.theta_se * math.sqrt(tokens) / widening


def windows_to_decide(distance: DistanceRatio, windows: int, bound: float) -> float:
    """How many windows would put `bound` outside of the interval, the ratio staying as it is."""
    away = abs(2 * math.log(bound) - distance.theta)
    if not math.isfinite(distance.theta_se) or away < 2e-3:
        return math.inf
    reach = float(student_quantile((1 + CONFIDENCE) / 2, max(distance.degrees, 1))) * distance.theta_se
    return windows * max(reach / away, 1.0) ** 2


def _ratio(interval: Interval) -> DistanceRatio:
    """exp(theta / 2) of an interval of theta."""
    if interval.high - interval.low > WIDEST:
        interval = interval._replace(low=-math.inf, high=math.inf, se=math.inf)
    reach = detectable_shift(max(interval.degrees, 1))
    low, mean, high, detectable = (
        math.exp(x / 2) if x < _LARGEST else math.inf
        for x in (interval.low, interval.mean, interval.high, reach * interval.se)
    )
    return DistanceRatio(
        ratio=mean,
        low=low,
        high=high,
        detectable=detectable,
        scope=interval.scope,
        theta=interval.mean,
        theta_se=interval.se,
        degrees=interval.degrees,
    )


@cache
def detectable_shift(degrees: int) -> float:
    """The shift of a mean, in standard errors, that the test finds with probability POWER.

    Solves P(t' > t_crit) = POWER for the noncentrality of Student's t; for many degrees of freedom it is
    z_{(1 + CONFIDENCE) / 2} + z_POWER.
    """
    critical = student_quantile((1 + CONFIDENCE) / 2, degrees)
    return shift_that_exceeds(critical, POWER, degrees)


def paired_difference(nll: np.ndarray, nll_reference: np.ndarray) -> PairedDifference:
    """Difference of the mean nll of two arms over the same tokens, [windows, tokens], and its error."""
    difference = np.atleast_2d(nll - nll_reference)
    mean, n = float(difference.mean()), difference.size
    blocks = np.concatenate([_block_means(row, block_length(difference)) for row in difference])
    if len(blocks) >= FEWEST_BLOCKS:
        return PairedDifference(mean, float(blocks.std(ddof=1)) / math.sqrt(len(blocks)), len(blocks))
    return PairedDifference(mean, float(difference.std()) / math.sqrt(n - 1) if n > 1 else math.nan)


def _block_means(row: np.ndarray, length: int) -> np.ndarray:
    """Means of consecutive blocks of about `length`: as many as fit best, of equal size."""
    blocks = max(round(len(row) / length), 1)
    edges = [len(row) * i // blocks for i in range(blocks + 1)]
    return np.array([row[a:b].mean() for a, b in pairwise(edges)])


def _t_interval(
    samples: np.ndarray, mean: float, widening: float, scope: str, confidence: float = CONFIDENCE
) -> Interval:
    degrees = len(samples) - 1
    if len(samples) < FEWEST_BLOCKS:
        return Interval(mean=mean, low=-math.inf, high=math.inf, se=math.inf, degrees=degrees, scope=scope)
    se = widening * float(samples.std(ddof=1)) / math.sqrt(len(samples))
    reach = float(student_quantile((1 + confidence) / 2, degrees)) * se
    return Interval(mean=mean, low=mean - reach, high=mean + reach, se=se, degrees=degrees, scope=scope)
