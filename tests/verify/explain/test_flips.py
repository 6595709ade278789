"""Flips on a reference whose roundings are known: probabilities are calibrated, verdicts seldom wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from verify.explain.flips import DRAWS, LEVELS, Walked, answer_of, detectable, together, walk, worst
from verify.explain.reference import Pass
from verify.explain.texts import Tokens, explain_texts

VOCABULARY = 40


class Drawn:
    """Stands for a model: at every position exact logits, and draws that lie sigma off, position by position.

    What a position's logits are depends on the tokens before it through their number alone.
    """

    def __init__(self, seed: int, length: int, *, gap: float = 1.0) -> None:
        rng = np.random.default_rng(seed)
        self.exact = rng.normal(0, gap, (length, VOCABULARY))
        # Sizes of rounding differ from place to place, as they do in models.
        self.sigma = 1e-2 * np.exp(0.5 * rng.normal(0, 1, (length, 1)))
        self.seed = seed
        self.tokenizer = self

    def right(self, seed: int) -> np.ndarray:
        """Logits of a right arithmetic."""
        rng = np.random.default_rng([self.seed, seed])
        return self.exact + self.sigma * rng.normal(0, 1, self.exact.shape)

    def logits(self, tokens: Sequence[int], way: Pass, scored: int) -> torch.Tensor:
        names = [draw.name for draw in DRAWS]
        found = self.right(names.index(way.name)) if way.name in names else self.exact
        return torch.from_numpy(found[len(tokens) - scored : len(tokens)].astype(np.float32))

    def token_text(self, token: int) -> str:
        return f"<{token}>"

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(map(self.token_text, tokens))


def text_of(logits: np.ndarray) -> list[int]:
    """A greedy text: the token after position n is the most likely one there. One token is the prompt."""
    return [int(x) for x in logits[:-1].argmax(1)]


def walked(reference: Any, text: Sequence[int]) -> Walked:
    return walk(reference, [0], text)


def test_stated_probabilities_are_calibrated() -> None:
    """Over many texts of right arithmetics, as many flips as the probabilities add up to, near and far."""
    expected = seen = 0.0
    p_flips, disagreed = [], []
    for seed in range(40):
        reference = Drawn(seed, 400, gap=0.1)
        a, b = (reference.right(100 + i) for i in range(2))
        found = walked(reference, text_of(a))
        expected += found.expected
        seen += len(found.flips)
        other = text_of(b)
        for flip in found.flips:
            p_flips.append(flip.p_flip)
            disagreed.append(other[flip.at] == flip.preferred)
    assert seen > 300
    assert 0.85 < seen / expected < 1.15, (seen, expected)
    # Where a flip is a coin's toss the other disagrees half the time; where it is rare, most often.
    p_flips, disagreed = np.array(p_flips), np.array(disagreed)
    near = p_flips > 0.4
    assert 0.35 < disagreed[near].mean() < 0.75
    assert disagreed[~near].mean() > disagreed[near].mean()


def pair(reference: Any, a: np.ndarray, b: np.ndarray) -> Tokens:
    return Tokens([0], text_of(a), text_of(b), known=True, cut_here=False)


def test_texts_of_right_arithmetics_are_ties() -> None:
    answers = []
    for seed in range(120):
        reference = Drawn(seed, 256, gap=0.2)
        tokens = pair(reference, reference.right(100), reference.right(101))
        if tokens.a != tokens.b:
            answers.append(explain_texts(reference, tokens, most=256).answer)  # type: ignore[arg-type]
    assert len(answers) > 100
    assert "not explained" not in answers
    assert answers.count("tie") >= 0.985 * len(answers), answers.count("tie")


def test_texts_of_a_fault_are_not_explained_and_never_ties() -> None:
    answers = []
    for seed in range(60):
        reference = Drawn(seed, 256, gap=0.5)
        rng = np.random.default_rng([8, seed])
        wrong = reference.exact + 0.5 * rng.normal(0, 1, reference.exact.shape)
        found = explain_texts(reference, pair(reference, reference.right(100), wrong), most=256)  # type: ignore[arg-type]
        answers.append(found.answer)
        assert "not explained by rounding" in " ".join(found.sentences)
    assert answers == ["not explained"] * 60


def test_a_tie_says_what_would_have_been_seen() -> None:
    reference = Drawn(3, 256, gap=0.2)
    tokens = pair(reference, reference.right(100), reference.right(101))
    found = explain_texts(reference, tokens, most=256)  # type: ignore[arg-type]
    assert found.answer == "tie"
    assert "would have shown in these" in found.sentences[-1]
    assert found.first is not None and found.margin is not None and found.detectable is not None
    # A fault of that size is seen in about 95 of 100 texts.
    seen = 0
    for seed in range(100):
        rng = np.random.default_rng([9, seed])
        noise = rng.normal(0, 1, reference.exact.shape) * found.detectable / np.sqrt(2)
        bad = worst(walked(reference, text_of(reference.exact + noise)))
        seen += bad is not None and bad.p < 1e-6
    assert seen >= 88, seen


def test_a_baseline_that_the_model_did_not_write_says_nothing_of_the_other() -> None:
    reference = Drawn(4, 256, gap=1.0)
    sampled = text_of(reference.exact)
    sampled[50] = (sampled[50] + 1) % VOCABULARY
    tokens = Tokens([0], sampled, text_of(reference.exact), known=True, cut_here=False)
    found = explain_texts(reference, tokens, most=256)  # type: ignore[arg-type]
    assert found.answer == "inconclusive"
    assert "A itself is not this model's greedy text" in found.sentences[-1]


def test_short_texts_show_nothing() -> None:
    reference = Drawn(5, 6)
    found = walked(reference, text_of(reference.exact))
    assert found.flips == []
    assert worst(found) is None
    assert detectable(found) > 0.1


@pytest.mark.parametrize("more", [0, 3])
def test_texts_that_end_elsewhere(more: int) -> None:
    reference = Drawn(6, 30)
    text = text_of(reference.exact)
    tokens = Tokens([0], text, text[: len(text) - more], known=True, cut_here=False)
    found = explain_texts(reference, tokens, most=256)  # type: ignore[arg-type]
    assert found.answer == ("inconclusive" if more else "tie")
    assert "the texts are the same" in found.sentences[0]


@pytest.mark.parametrize(
    ("rarest", "joined", "flips", "answer"),
    [
        (1.0, 1.0, 0, "tie"),
        (2e-3, 1.0, 1, "tie"),
        # Of ten flips one is as rare as 1 in 10,000 now and then; of one it is not.
        (2e-4, 1.0, 10, "tie"),
        (2e-4, 1.0, 1, "inconclusive"),
        (1.0, 1e-4, 9, "inconclusive"),
        (9e-7, 1.0, 1, "not explained"),
        # No flip is rare, but so many of them are.
        (0.5, 9e-7, 9, "not explained"),
    ],
)
def test_what_flips_come_to(rarest: float, joined: float, flips: int, answer: str) -> None:
    assert answer_of(rarest, joined, flips) == answer


def test_flips_count_by_their_number_and_by_their_rareness() -> None:
    # 1,000 positions with one rival each, 3 sigmas away: rounding makes 5.5 flips with 12 degrees of freedom.
    ratios, degrees = np.full((1000, 1), 3.0), 12
    mean = 1000 * stats.t.sf(3.0, degrees)
    p = 2 * stats.t.sf(3.0, degrees)
    assert together(ratios, degrees, {}, None) == 1.0
    three = together(ratios, degrees, dict.fromkeys(range(3), p), None)
    assert three == pytest.approx(min(1.0, len(LEVELS) * stats.poisson.sf(2, mean)))
    assert together(ratios, degrees, dict.fromkeys(range(30), p), None) < 1e-9
    # Rare ones count more than common ones do.
    rare = together(ratios, degrees, {1: 1e-5, 2: 1e-5}, None)
    few = 1000 * stats.t.sf(stats.t.isf(1e-4 / 2, degrees), degrees)
    assert rare == pytest.approx(len(LEVELS) * stats.poisson.sf(1, few))


def test_the_flip_that_was_sought_counts_among_flips_alone() -> None:
    ratios, degrees = np.full((100, 1), 3.0), 12
    p = 2 * stats.t.sf(3.0, degrees)
    assert together(ratios, degrees, {7: p}, 7) == pytest.approx(1.0)
    among = 1e-5 / p
    assert together(ratios, degrees, {7: 1e-5}, 7) == pytest.approx(among * (1 - math.log(among)))
    # With a second flip as rare it is less likely than by itself.
    both = together(ratios, degrees, {7: 1e-5, 8: 1e-5}, 7)
    assert both < 0.1 * together(ratios, degrees, {7: 1e-5}, 7)
