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
from scipy import special

# The one pre-declared test: two-sided, at 99.9 %.
CONFIDENCE = 0.999
POWER = 0.9
BLOCK_TOKENS = 64
# Blocks of a window are not independent: their standard error is widened by this, and few windows say
# nothing about other texts.
BLOCK_WIDENING = 1.2
WINDOWS_FOR_T = 8
# Divergences are computed in float64 from float32 logits: below this they are its rounding.
SMALLEST_KLD = 1e-15
# From here on exp(theta / 2) is no number.
_LARGEST = 1400.0


class Interval(NamedTuple):
    """A mean with its interval; scope: what the interval speaks about."""

    mean: float
    low: float
    high: float
    se: float
    degrees: int
    scope: str


class DistanceRatio(NamedTuple):
    """Distance of the candidate to exact over that of the reference, with its interval at CONFIDENCE.

    detectable: the smallest ratio that this run would have told from 1, with probability POWER; infinite, as
    high is, where there is one sample and so no interval. theta and its standard error: 2 ln ratio.
    """

    ratio: float
    low: float
    high: float
    detectable: float
    scope: str
    theta: float = math.nan
    theta_se: float = math.nan


class PairedDifference(NamedTuple):
    """mean of nll_candidate - nll_reference, its standard error (tokens taken as independent)."""

    mean: float
    se: float


def window_interval(values: np.ndarray, *, confidence: float = CONFIDENCE) -> Interval:
    """Interval of the mean of values [windows, tokens].

    Under WINDOWS_FOR_T windows: Student's t over blocks of 64 tokens, widened, about this text only; from
    there on: t over window means. (A bootstrap over windows covers less, and less than it says: at 20 windows
    of heavy-tailed data 98 % of a nominal 99.9 %. `tests/verify/test_statistics.py` simulates all of this.)
    """
    if values.shape[0] < WINDOWS_FOR_T:
        blocks = np.concatenate([_block_means(row) for row in values])
        return _t_interval(blocks, float(values.mean()), BLOCK_WIDENING, "this text only", confidence)
    means = values.mean(1)
    return _t_interval(means, float(means.mean()), 1.0, "texts like this one", confidence)


def ratio_of_samples(log_squares: np.ndarray, scope: str = "these inputs") -> DistanceRatio:
    """Distance ratio from independent samples of ln(square error / square error of the reference)."""
    return _ratio(_t_interval(log_squares, float(log_squares.mean()), 1.0, scope))


def distance_ratio(kld: np.ndarray, kld_reference: np.ndarray) -> DistanceRatio:
    """Distance ratio of two arms from their divergences to exact, both [windows, tokens]."""
    theta = np.log(np.maximum(kld, SMALLEST_KLD) / np.maximum(kld_reference, SMALLEST_KLD))
    return _ratio(window_interval(theta))


def _ratio(interval: Interval) -> DistanceRatio:
    """exp(theta / 2) of an interval of theta."""
    reach = detectable_shift(max(interval.degrees, 1))
    low, mean, high, detectable = (
        math.exp(x / 2) if x < _LARGEST else math.inf
        for x in (interval.low, interval.mean, interval.high, reach * interval.se)
    )
    return DistanceRatio(mean, low, high, detectable, interval.scope, interval.mean, interval.se)


@cache
def detectable_shift(degrees: int) -> float:
    """The shift of a mean, in standard errors, that the test finds with probability POWER.

    Solves P(t' > t_crit) = POWER for the noncentrality of Student's t; for many degrees of freedom it is
    z_{(1 + CONFIDENCE) / 2} + z_POWER.
    """
    critical = special.stdtrit(degrees, (1 + CONFIDENCE) / 2)
    return float(special.nctdtrinc(degrees, 1 - POWER, critical))


def paired_difference(nll: np.ndarray, nll_reference: np.ndarray) -> PairedDifference:
    """Difference of the mean nll of two arms over the same tokens, and its standard error."""
    difference = (nll - nll_reference).ravel()
    n = len(difference)
    se = float(difference.std()) / math.sqrt(n - 1) if n > 1 else math.nan
    return PairedDifference(float(difference.mean()), se)


def _block_means(row: np.ndarray) -> np.ndarray:
    """Means of consecutive blocks of BLOCK_TOKENS; a short rest joins the last block."""
    blocks = max(len(row) // BLOCK_TOKENS, 1)
    edges = [i * BLOCK_TOKENS for i in range(blocks)] + [len(row)]
    return np.array([row[a:b].mean() for a, b in pairwise(edges)])


def _t_interval(
    samples: np.ndarray, mean: float, widening: float, scope: str, confidence: float = CONFIDENCE
) -> Interval:
    degrees = len(samples) - 1
    if degrees < 1:
        return Interval(mean, -math.inf, math.inf, math.inf, 0, scope)
    se = widening * float(samples.std(ddof=1)) / math.sqrt(len(samples))
    reach = float(special.stdtrit(degrees, (1 + confidence) / 2)) * se
    return Interval(mean, mean - reach, mean + reach, se, degrees, scope)
