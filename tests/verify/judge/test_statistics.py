from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.signal import lfilter

from verify.judge.statistics import (
    CONFIDENCE,
    block_length,
    deviation_of,
    distance_ratio,
    expected_half_width,
    paired_difference,
    window_interval,
    windows_to_decide,
)


def draw(windows: int, *, ratio: float, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Divergences of a candidate whose distance is `ratio` times its reference's."""
    rng = np.random.default_rng(seed)
    reference = np.exp(rng.normal(-14, 2, (windows, 255)))
    return reference * ratio**2 * np.exp(rng.normal(0, spread, reference.shape)), reference


@pytest.mark.parametrize("windows", [4, 12, 40])
@pytest.mark.parametrize("ratio", [1.0, 1.5])
def test_the_ratio_is_found_and_its_interval_covers_it(windows: int, ratio: float) -> None:
    found = [distance_ratio(*draw(windows, ratio=ratio, seed=s)) for s in range(30)]
    assert np.median([f.ratio for f in found]) == pytest.approx(ratio, rel=0.03)
    # Nominally 1 in 1000 misses.
    assert sum(not f.low <= ratio <= f.high for f in found) <= 1


def test_exchanging_the_arms_inverts_the_ratio() -> None:
    a, b = draw(4, ratio=1.3, seed=1)
    there, back = distance_ratio(a, b), distance_ratio(b, a)
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert there.low == pytest.approx(1 / back.high)


def test_a_difference_of_the_detectable_size_is_mostly_detected() -> None:
    reach = float(np.median([distance_ratio(*draw(12, ratio=1.0, seed=s)).detectable for s in range(20)]))
    seen = sum(distance_ratio(*draw(12, ratio=reach, seed=100 + s)).low > 1 for s in range(40))
    assert seen >= 28


def test_more_windows_see_less() -> None:
    few, many = (distance_ratio(*draw(n, ratio=1.0, seed=3)).detectable for n in (4, 64))
    assert 1 < many < few


def test_the_scope_says_what_the_interval_is_about() -> None:
    assert window_interval(np.random.default_rng(0).normal(size=(4, 255))).scope == "this text only"
    assert window_interval(np.random.default_rng(0).normal(size=(8, 255))).scope == "texts like this one"


def test_one_short_window_promises_nothing() -> None:
    interval = window_interval(np.ones((1, 30)))
    assert interval.low == -math.inf
    assert interval.high == math.inf
    ratio = distance_ratio(np.full((1, 30), 4e-9), np.full((1, 30), 1e-9))
    assert ratio.ratio == pytest.approx(2)
    assert (ratio.low, ratio.high, ratio.detectable) == (0, math.inf, math.inf)


def heavy_tailed(windows: int, rng: np.random.Generator, *, shared: float) -> np.ndarray:
    """[windows, 255] of mean 0: neighbours correlate (0.5), tails are those of t with 3 degrees of freedom.

    shared: size of what all tokens of a window have in common, in standard errors of a window's mean.
    """
    noise = rng.standard_t(3, (windows, 255))
    values = lfilter([1.0], [1.0, -0.5], noise, axis=1)
    return values + shared * 2 * rng.standard_t(3, (windows, 1)) / math.sqrt(255)


@pytest.mark.parametrize(("windows", "repeats"), [(4, 1500), (8, 1500), (16, 1500), (20, 1500), (64, 1000)])
@pytest.mark.parametrize("confidence", [0.95, CONFIDENCE])
def test_intervals_cover_at_their_nominal_rate(windows: int, repeats: int, confidence: float) -> None:
    # Blocks of few windows are widened for a little that they have in common, no more.
    shared = 0.5 if windows < 8 else 1.0
    rng = np.random.default_rng(windows)
    covered = 0
    for _ in range(repeats):
        found = window_interval(heavy_tailed(windows, rng, shared=shared), confidence=confidence)
        covered += found.low <= 0 <= found.high
    if confidence == CONFIDENCE:
        # Of 1,500 a nominal 99.9 % misses 1.5; 97.5 % would miss 37.
        assert repeats - covered <= 8
    else:
        assert covered / repeats == pytest.approx(confidence, abs=0.03)


def test_what_the_windows_have_in_common_is_not_overlooked() -> None:
    # Blocks of 64 tokens taken as independent would cover 61 % here.
    rng = np.random.default_rng(1)
    found = [window_interval(heavy_tailed(8, rng, shared=3.0), confidence=0.95) for _ in range(1000)]
    assert np.mean([x.low <= 0 <= x.high for x in found]) > 0.92


def test_equal_divergences_are_a_ratio_of_one() -> None:
    kld = np.full((4, 255), 1e-7)
    assert distance_ratio(kld, kld).ratio == 1.0
    zero = np.zeros((4, 255))
    assert distance_ratio(zero, zero).ratio == 1.0


def test_the_paired_error_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(3, 2, (4, 255))
    difference = paired_difference(base + rng.normal(1e-3, 1e-3, base.shape), base)
    assert difference.mean == pytest.approx(1e-3, abs=4 * difference.se)
    assert difference.se == pytest.approx(1e-3 / math.sqrt(4 * 255), rel=0.3)
    assert difference.blocks == 4 * 16


def test_neighbours_that_agree_are_not_independent_in_the_paired_error() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        series = lfilter([1.0], [1.0, -0.9], rng.normal(size=(4, 512)), axis=1)
        found.append(paired_difference(series, np.zeros_like(series)))
    true = float(np.std([f.mean for f in found]))
    assert np.mean([f.se for f in found]) == pytest.approx(true, rel=0.2)
    assert not any(f.beyond_chance for f in found)
    assert paired_difference(series + 5 * true * 10, np.zeros_like(series)).beyond_chance
    few = paired_difference(np.full((1, 64), 9.0) + rng.normal(size=(1, 64)), np.zeros((1, 64)))
    assert few.blocks == 0
    assert not few.beyond_chance


def test_blocks_are_as_long_as_the_autocorrelation_asks() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4, 512))
    assert block_length(noise) == 16
    assert 50 <= block_length(lfilter([1.0], [1.0, -0.9], noise, axis=1)) <= 200
    assert block_length(np.ones((4, 10))) == 10
    # Of two whole periods the mean is 0; a lag's is over the products that it has.
    wave = np.cos(2 * np.pi * np.arange(512) / 256)[None]
    means = ((wave[:, lag:] * wave[:, :-lag]).mean() for lag in range(1, 512))
    assert block_length(wave) == 5 * (1 + next(i for i, mean in enumerate(means) if mean < 0.05))


def test_no_interval_comes_of_fewer_than_eight_blocks() -> None:
    kld = np.exp(np.random.default_rng(0).normal(-14, 2, (1, 110)))
    found = distance_ratio(kld * 2, kld)
    assert (found.low, found.high) == (0, math.inf)
    enough = distance_ratio(*draw(2, ratio=1.0, seed=0))
    assert 0.4 < enough.low < 1 < enough.high < 2.5


def test_an_interval_that_says_nothing_is_none() -> None:
    rng = np.random.default_rng(0)
    kld, reference = np.exp(rng.normal(-20, 40, (2, 2, 64)))
    found = distance_ratio(kld, reference)
    assert (found.low, found.high) == (0, math.inf)


def test_few_tokens_that_hold_the_difference_are_named() -> None:
    kld, reference = draw(4, ratio=1.0, seed=0)
    assert not distance_ratio(kld, reference).few_tokens_hold_it
    kld[2, 7] += 100 * reference.sum()
    assert distance_ratio(kld, reference).few_tokens_hold_it


@pytest.mark.parametrize("windows", [2, 4, 16, 64])
def test_the_half_width_is_foretold(windows: int) -> None:
    """Of a run whose spread is the typical one."""
    found = [distance_ratio(*draw(windows, ratio=1.0, seed=s, spread=1.25)) for s in range(20)]
    widths = [math.sqrt(f.high / f.low) - 1 for f in found]
    assert expected_half_width(windows, windows * 255) == pytest.approx(float(np.median(widths)), rel=0.3)
    spread = [deviation_of(f, windows, windows * 255) for f in found]
    assert float(np.median(spread)) == pytest.approx(1.25, rel=0.2)
    assert expected_half_width(1, 100) == math.inf


def test_as_many_windows_as_are_named_decide() -> None:
    few = distance_ratio(*draw(4, ratio=1.15, seed=3))
    assert few.low < 1.25 < few.high
    needed = windows_to_decide(few, 4, 1.25)
    assert 4 < needed < 200
    assert distance_ratio(*draw(math.ceil(needed) + 4, ratio=1.15, seed=4)).high < 1.25
