"""Rules about two logits files: classes of tokens, and the order in which verdicts apply."""

from __future__ import annotations

import math

import numpy as np

from verify.engines.conclusion import by_margin, by_position, compare, resolution_of, worst_tokens
from verify.engines.divergence import FileScores, PairScores

WINDOWS, SCORED = 8, 16


def file_scores(seed: int, *, nll: float = 2.0, step: float = 1e-4, margin: float = 0.5) -> FileScores:
    rng = np.random.default_rng(seed)
    shape = WINDOWS, SCORED
    return FileScores(
        nll=nll + 1e-3 * rng.standard_normal(shape),
        top1=np.zeros(shape, np.int32),
        largest=np.full(shape, -1.0),
        margin=np.full(shape, margin),
        step=np.full(shape, step),
        clipped=np.zeros(shape, bool),
        finite=np.ones(shape, bool),
        squares=np.full(shape, 0.2),
    )


def pair(other: FileScores | None = None, *, kld: float = 1e-2, same: bool = False) -> PairScores:
    klds = kld * (1 + 0.1 * np.random.default_rng(5).standard_normal((WINDOWS, SCORED)))
    return PairScores(file_scores(0), other or file_scores(1), klds, np.full((WINDOWS, SCORED), same))


def test_a_record_that_is_no_number_is_broken_and_named() -> None:
    other = file_scores(1)
    other.finite[2, 3] = False
    decision = compare(pair(other), first_scored=16).decision
    assert decision.verdict == "broken"
    assert "OTHER: 1 of 128 records hold NaN or Inf, first in window 3 at position 19" in decision.reasons[0]


def test_equal_records_are_identical_whatever_else() -> None:
    assert compare(pair(same=True, kld=0.0), first_scored=16, max_kld=0.0).decision.verdict == "identical"


def test_a_limit_that_was_given_decides() -> None:
    assert compare(pair(kld=1e-2), first_scored=16, max_kld=1e-1).decision.verdict == "round-off"
    assert compare(pair(kld=1e-2), first_scored=16, max_kld=1e-3).decision.verdict == "degraded"


def test_a_text_that_is_predicted_worse_or_better() -> None:
    assert compare(pair(file_scores(1, nll=2.1)), first_scored=16).decision.verdict == "degraded"
    assert compare(pair(file_scores(1, nll=1.9)), first_scored=16).decision.verdict == "improved"


def test_what_16_bits_hide_is_round_off_and_more_is_not_decided() -> None:
    fine = pair(kld=1e-12)
    assert abs(fine.kld.mean()) < resolution_of(fine).mean_kld
    assert compare(fine, first_scored=16).decision.verdict == "round-off"
    decision = compare(pair(kld=1e-2), first_scored=16).decision
    assert decision.verdict == "inconclusive"
    assert "two files cannot say which is nearer to exact" in decision.reasons[0]


def test_tokens_are_in_one_class_each() -> None:
    some = pair()
    some.base.margin[:, :4] = 0.0
    some.base.margin[:, 4:8] = 5.0
    some.other.top1[:, 0] = 1
    difference = some.other.nll - some.base.nll
    classes = by_margin(some, difference)
    assert sum(c.tokens for c in classes) == WINDOWS * SCORED
    assert (classes[0].tokens, classes[0].changed) == (4 * WINDOWS, WINDOWS)
    assert classes[-1].tokens == 4 * WINDOWS
    assert math.isnan(classes[1].kld), "no token has such a margin"
    quarters = by_position(some, difference, 16)
    assert [c.tokens for c in quarters] == [4 * WINDOWS] * 4
    assert quarters[0].name == "n_kv 17 to 20"


def test_the_largest_divergences_come_with_their_places() -> None:
    some = pair()
    some.kld[3, 5], some.kld[1, 0] = 9.0, 8.0
    first, second, _ = worst_tokens(some, 16)
    assert (first.window, first.position, first.kld) == (3, 21, 9.0)
    assert (second.window, second.position) == (1, 16)
