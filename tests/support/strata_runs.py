"""Runs of the strata's tests on energies of known truth: how often do limits miss, and verdicts lie?

Energies are two-point (rows of two kinds), lognormal, or rows recorded from `eager` on the CPU
(`row_energies.npz` beside the tests; `benchmarks/strata.py` records it), drawn with replacement from what is
then the whole population. The candidate's are scaled so that the true ratio is what a run asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from verify.judge.strata import ALPHA, holm, improvement_of, log_ratio, share_of_look
from verify.judge.verdict import DEFAULT_MARGIN

RECORDED = Path(__file__).with_name("row_energies.npz")
TRUTHS = {"1": 1.0, "M": DEFAULT_MARGIN, "1/1.1": 1 / 1.1}
# Runs held at once.
_AT_ONCE = 2000


class Kind(NamedTuple):
    """A kind of input: its name, and the population that rows are drawn from, candidate and reference of true
    ratio 1."""

    name: str
    candidate: np.ndarray
    reference: np.ndarray

    def rows(self, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.integers(0, len(self.candidate), shape)
        return self.candidate[chosen], self.reference[chosen]


def _kind(name: str, candidate: np.ndarray, reference: np.ndarray) -> Kind:
    return Kind(name, candidate / candidate.mean(), reference / reference.mean())


def made_kinds(rng: np.random.Generator, population: int = 200_000) -> list[Kind]:
    """Two-point and lognormal rows. A row's own error is the mean of some squares, as of columns."""
    found = []
    for share, times in ((0.5, 9), (0.25, 9), (0.25, 16)):
        heavy = rng.random((2, population)) < share
        energies = np.where(heavy, times, 1.0) * rng.gamma(4, 1 / 4, (2, population))
        found.append(_kind(f"two-point {share:g} of {times} times", *energies))
    for spread, shared in ((0.5, 0.0), (0.5, 1.0), (1.0, 0.0), (1.0, 1.0)):
        size = rng.normal(0, shared, population)
        energies = np.exp(size + rng.normal(0, spread, (2, population)))
        found.append(_kind(f"lognormal {spread:g}, size {shared:g}", *energies))
    return found


def recorded_kinds(file: Path = RECORDED) -> list[Kind]:
    """Every pair and family of the recording, over all heads and of one head alone."""
    with np.load(file) as stored:
        energy, floor = (np.exp2(stored[name].astype(float)) for name in ("energy", "floor"))
        specs, families, pairs = (stored[name].tolist() for name in ("specs", "families", "pairs"))
    found = []
    for candidate, reference in pairs:
        c, b = energy[specs.index(candidate)], energy[specs.index(reference)]
        f = floor[specs.index(candidate)]
        for j, family in enumerate(families):
            for heads, said in ((slice(None), ""), (slice(0, 1), ", one head")):
                x, y = ((e[j][:, heads] + f[j][:, heads]).mean(-1) for e in (c, b))
                if not np.array_equal(x, y):
                    found.append(_kind(f"{candidate} / {reference}, {family}{said}", x, y))
    return found


class Misses(NamedTuple):
    """Of one kind and truth: how often the upper limit lies below it, and the lower one above."""

    kind: str
    truth: str
    samples: int
    upper: float
    lower: float


def limit_misses(
    kinds: list[Kind],
    *,
    runs: int,
    samples: int,
    seed: int = 0,
    lengths: int = 1,
    truths: Iterable[str] = TRUTHS,
) -> Iterator[Misses]:
    """Over `runs` draws of each kind. lengths: strata of the family, which lend each other dispersion where
    samples are few."""
    rng = np.random.default_rng(seed)
    for kind in kinds:
        for truth in truths:
            ratio = TRUTHS[truth]
            missed = np.zeros(2)
            for first in range(0, runs, _AT_ONCE):
                count = min(_AT_ONCE, runs - first)
                c, b = kind.rows(rng, (count, lengths, samples))
                found = _lent(c * ratio**2, b) if lengths > 1 else log_ratio(c[:, 0] * ratio**2, b[:, 0])
                upper, lower = (found.limit(sign) for sign in (1, -1))
                missed += (upper < math.log(ratio)).sum(), (lower > math.log(ratio)).sum()
            yield Misses(kind.name, truth, samples, *(missed / runs))


def _lent(c: np.ndarray, b: np.ndarray) -> Any:
    """ln R of the first of some strata of few samples, as `judge_strata` lends them dispersion."""
    from verify.judge.strata import Stratum, _ratios

    found = []
    for one_c, one_b in zip(c, b, strict=True):
        zero = np.zeros((c.shape[-1], 1))
        strata = [
            Stratum(
                shape="shape",
                n_kv=n,
                family="family",
                candidate=x[:, None],
                reference=y[:, None],
                floor=zero,
                power=zero,
                heads=(),
            )
            for n, (x, y) in enumerate(zip(one_c, one_b, strict=True))
        ]
        found.append(_ratios(strata)[0])
    return type(found[0])(*(np.array(x) for x in zip(*found, strict=True)))


class FalseWords(NamedTuple):
    """Of whole runs whose strata all have one true ratio: how often one is called degraded, improved."""

    truth: str
    samples: int
    degraded: float
    improved: float


def false_words(
    kinds: list[Kind], *, runs: int, samples: int, seed: int = 0, truths: Iterable[str] = TRUTHS
) -> Iterator[FalseWords]:
    """A run has a stratum of each kind."""
    rng = np.random.default_rng(seed)
    for truth in truths:
        ratio = TRUTHS[truth]
        chances: list[list[np.ndarray]] = [[], []]
        for kind in kinds:
            pieces: list[list[np.ndarray]] = [[], []]
            for first in range(0, runs, _AT_ONCE):
                c, b = kind.rows(rng, (min(_AT_ONCE, runs - first), samples))
                found = log_ratio(c * ratio**2, b)
                pieces[0].append(found.chance(math.log(DEFAULT_MARGIN), 1))
                pieces[1].append(found.chance(math.log(improvement_of(DEFAULT_MARGIN)), -1))
            for of_word, piece in zip(chances, pieces, strict=True):
                of_word.append(np.concatenate(piece))
        words = [float(holm(np.stack(of_word, -1), ALPHA).any(-1).mean()) for of_word in chances]
        yield FalseWords(truth, samples, *words)


class Looks(NamedTuple):
    """Of whole runs whose strata all have one true ratio, doubled until they decide, in so many looks."""

    ratio: float  # true, of every stratum
    runs: int
    looks: int  # at most
    degraded: float  # share of runs that are called so at any look
    improved: float  # likewise
    # Of the kind that it happens to most: share of runs that end with its upper limit below the truth.
    missed: float
    decided: float  # share of strata whose upper limit ends inside the margin
    rows: float  # mean of a stratum, in units of its first look's


def looks(
    kinds: list[Kind], *, runs: int, samples: int, looks: int, ratios: Iterable[float], seed: int = 0
) -> Iterator[Looks]:
    """A run has a stratum of each kind, of `samples` rows at its first look. Kinds whose upper limit is not
    inside the margin go on to twice as many, until one of them is degraded, or to the last look."""
    rng = np.random.default_rng(seed)
    shares = np.array([share_of_look(1 + j, looks) for j in range(looks)])
    margin = math.log(DEFAULT_MARGIN)
    for ratio in ratios:
        # [looks, runs, kinds]
        worse, better, upper = ([], [], [])
        for kind in kinds:
            of_kind: list[list[np.ndarray]] = []
            for first in range(0, runs, _AT_ONCE):
                c, b = kind.rows(rng, (min(_AT_ONCE, runs - first), samples << (looks - 1)))
                piece = []
                for j, share in enumerate(shares):
                    found = log_ratio(c[:, : samples << j] * ratio**2, b[:, : samples << j])
                    chances = [
                        found.chance(bound, sign) / share
                        for bound, sign in ((margin, 1), (math.log(improvement_of(DEFAULT_MARGIN)), -1))
                    ]
                    piece.append(np.stack([*chances, found.limit(1, ALPHA * share)]))
                of_kind.append(np.stack(piece, 1))
            for into, x in zip((worse, better, upper), np.concatenate(of_kind, -1), strict=True):
                into.append(x)
        yield _looked([np.stack(x, -1) for x in (worse, better, upper)], ratio)


def _looked(figures: list[np.ndarray], ratio: float) -> Looks:
    worse, better, upper = figures
    count, runs, kinds = worse.shape
    at = np.zeros((runs, kinds), int)
    degraded, improved = np.zeros(runs, bool), np.zeros(runs, bool)

    def now(x: np.ndarray) -> np.ndarray:
        return np.take_along_axis(x, at[None], 0)[0]

    for _ in range(count):
        degraded |= holm(now(worse)).any(-1)
        improved |= holm(now(better)).any(-1)
        is_open = (now(upper) > math.log(DEFAULT_MARGIN)) & ~degraded[:, None]
        at = np.minimum(at + is_open, count - 1)
    ends = now(upper)
    return Looks(
        ratio=ratio,
        runs=runs,
        looks=count,
        degraded=float(degraded.mean()),
        improved=float(improved.mean()),
        missed=float((ends < math.log(ratio)).mean(0).max()),
        decided=float((ends <= math.log(DEFAULT_MARGIN)).mean()),
        rows=float((2.0**at).mean()),
    )
