"""Strata: the kinds of input that a pair of kernels is compared on, each by itself, and one verdict over all.

A length, a family of inputs and a head are fixed kinds: nobody draws them, and a mean over unlike ones is no
distance. Within a kind, a stratum, rows are drawn: they are the samples. What a stratum says is the ratio of
the two kernels' root mean square errors to float64,

    R = sqrt((E_c + f) / (E_b + f)),   E: mean square error, f: square of a quarter step of the result type

with f so that errors which the result's own type cannot show are no difference; and f is at least the
square of a NEGLIGIBLE part of the reference's typical error at this length, that on plain inputs: errors of
heads add up in a layer's output, where the smaller one is not seen beside the typical one. ln R of the pooled
energies has the jackknife's standard error; its square gains PRIOR_DISPERSION^2 / samples, for kernels that
differ in few rows show too little of how much they may, and the error WIDENING times. Student's t has the
degrees of freedom of the samples that really count, (sum x)^2 / sum x^2 - 1. Under FEWEST_SAMPLES the
dispersion is shrunk towards that of the other strata of the family, as if samples were missing up to
FEWEST_SAMPLES.

Tests are one-sided at ALPHA over all strata together (Holm): R <= margin, whose rejection is `degraded`, and
R >= 1/1.10, whose rejection is `improved`. Limits that are printed are each stratum's own, at 1 - ALPHA.

Samples may be looked at several times: a stratum that cannot decide is given as many again, up to a most
(`looks_until`). Look j has 2^(j-1) times the samples of the first, whatever was seen, and a share of ALPHA of
its own (`share_of_look`): chances are divided by it, and limits are at 1 - ALPHA times it. Shares add up to
1, so by Bonferroni's inequality what is said at any of the looks is wrong at most as often as after a single
one, however it was decided to go on. Groups of heads are found once, at the first look.

`benchmarks/strata.py` simulates all of this; `docs/evidence.md` has its results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from verify.judge.chances import normal_quantile, student_below, student_quantile

# One-sided, of each limit, and of all tests of a run together.
ALPHA = 0.001
POWER = 0.9
# Constants fixed by simulation (`benchmarks/strata.py`).
FEWEST_SAMPLES = 32
PRIOR_DISPERSION = 0.15
WIDENING = 1.2
# Errors below this part of the typical one do not count: they change its energy by 1 in 4,096.
NEGLIGIBLE = 64.0
# The family of inputs on which an error is typical.
PLAIN = "gaussian"
# Improved is what is closer than this by more than chance allows.
IMPROVEMENT = 1.10
# Heads are told apart where groups of them differ by this factor, beyond this chance, at each half's samples.
HEAD_FACTOR, HEAD_CHANCE, FEWEST_TO_SPLIT = 2.0, 1e-6, 16
MOST_HEAD_GROUPS = 4

Word = Literal["degraded", "inconclusive", "improved", "round-off", "equal"]
# Of several strata, the first of these is what is said of them all.
GRAVITY: tuple[Word, ...] = ("degraded", "inconclusive", "improved", "round-off", "equal")


class LogRatio(NamedTuple):
    """ln R of paired energies, its standard error, and degrees of freedom; arrays [...] of any shape."""

    value: np.ndarray
    se: np.ndarray
    degrees: np.ndarray

    def limit(self, sign: int, alpha: float = ALPHA) -> np.ndarray:
        """The upper (sign 1) or lower (-1) limit of ln R, one-sided at 1 - alpha."""
        return np.asarray(self.value + sign * student_quantile(1 - alpha, self.degrees) * self.se)

    def chance(self, bound: float, sign: int) -> np.ndarray:
        """p of ln R <= bound (sign 1) or ln R >= bound (-1)."""
        return np.asarray(student_below(-sign * (self.value - bound) / self.se, self.degrees))


def log_ratio(
    candidate: np.ndarray, reference: np.ndarray, *, borrowed: tuple[float, float] = (0.0, 0.0)
) -> LogRatio:
    """ln R of energies [..., samples], all above 0 and at least 2 samples.

    borrowed: dispersion (variance of one sample's ln R) of like strata, and the samples it stands for.
    """
    n = candidate.shape[-1]
    sums = [x.sum(-1, keepdims=True) for x in (candidate, reference)]
    value = 0.5 * np.log(sums[0] / sums[1])[..., 0]
    variance = _dispersion(candidate, reference, sums)
    weights = n - 1, borrowed[1]
    shrunk = (weights[0] * variance + weights[1] * borrowed[0]) / sum(weights)
    # What one stratum shows by itself is never argued away.
    variance = np.maximum(variance, shrunk)
    counting = np.minimum(*(x.sum(-1) ** 2 / np.square(x).sum(-1) for x in (candidate, reference)))
    se = WIDENING * np.sqrt((variance + PRIOR_DISPERSION**2) / n)
    return LogRatio(value, se, np.maximum(counting - 1, 1) + borrowed[1])


def _dispersion(candidate: np.ndarray, reference: np.ndarray, sums: Sequence[np.ndarray]) -> np.ndarray:
    """Variance of one sample's ln R, by leaving out each in turn. Infinite where one holds everything."""
    n = candidate.shape[-1]
    rest = [np.maximum(s - x, 0.0) for s, x in zip(sums, (candidate, reference), strict=True)]
    with np.errstate(divide="ignore", invalid="ignore"):
        left_out = 0.5 * np.log(rest[0] / rest[1])
        found = (n - 1) * np.square(left_out - left_out.mean(-1, keepdims=True)).sum(-1)
    return np.where(np.isfinite(found), found, np.inf)


def holm(chances: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Which of chances [..., tests] are rejected, all together at `alpha`: Holm's step-down procedure."""
    tests = chances.shape[-1]
    order = np.argsort(chances, -1)
    sorted_ = np.take_along_axis(chances, order, -1)
    passed = np.logical_and.accumulate(sorted_ <= alpha / np.arange(tests, 0, -1), -1)
    rejected = np.zeros(chances.shape, dtype=bool)
    np.put_along_axis(rejected, order, passed, -1)
    return rejected


def looks_until(samples: int, most: int) -> int:
    """Looks at a stratum of so many samples that is doubled, again and again, to at most `most`."""
    return max(most // samples, 1).bit_length()


def share_of_look(look: int, looks: int) -> float:
    """The share of ALPHA that a look, from 1, of so many may spend: half of what is left, the last all."""
    return 0.5 ** min(look, looks - 1)


def improvement_of(margin: float) -> float:
    """The ratio that `improved` must be below: 1/1.10, or 1/margin where that is nearer to 1."""
    return 1 / min(IMPROVEMENT, margin)


@dataclass(frozen=True)
class Stratum:
    """One kind of input: mean square errors an element of both kernels, [samples, heads]."""

    shape: str  # of the layer
    n_kv: int  # visible keys
    family: str  # of inputs
    candidate: np.ndarray  # its errors' energies
    reference: np.ndarray  # its errors' energies
    floor: np.ndarray  # f, what the result type cannot show
    power: np.ndarray  # mean square of the exact result
    heads: tuple[int, ...]  # their numbers, as they are printed
    a_kv_head: int = 1  # query heads of a KV head
    look: int = 1  # at its samples, from 1
    looks: int = 1  # that it may be given
    first: int | None = None  # samples of its first look; None: all
    # Samples that are left out, for in them the candidate's sums overflow, and the reference's do not.
    overflows: int = 0
    # The reference's typical error at this length: its mean square over that of the result; 0: not known.
    typical: float = 0.0

    @property
    def share(self) -> float:
        """Of ALPHA, that this look may spend."""
        return share_of_look(self.look, self.looks)

    @property
    def equal(self) -> bool:
        """All errors are the same to the bit, or below what the result type shows."""
        if self.overflows:
            return False
        both = self.candidate, self.reference
        return bool(np.array_equal(*both) or all(x.mean() <= self.floor.mean() for x in both))

    def energies(self) -> tuple[np.ndarray, np.ndarray]:
        """Of candidate and reference, the floor added, the mean over heads: [samples]."""
        least = np.finfo(float).tiny
        found = [np.maximum((x + self.floor).mean(-1), least) for x in (self.candidate, self.reference)]
        return found[0], found[1]

    def part(self, rows: Sequence[int] | np.ndarray, heads: Sequence[int]) -> Stratum:
        """Some samples of some heads (indices into both)."""
        chosen = list(heads)
        names = ("candidate", "reference", "floor", "power")
        arrays = {name: getattr(self, name)[rows][:, chosen] for name in names}
        return replace(self, heads=tuple(self.heads[i] for i in chosen), **arrays)


@dataclass(frozen=True)
class StratumResult:
    """What one stratum says."""

    shape: str  # of the layer
    n_kv: int  # visible keys
    family: str  # of inputs
    heads: str  # in words, empty for all
    samples: int  # rows
    ratio: float  # R
    low: float  # its own one-sided limit at 1 - ALPHA
    high: float  # likewise
    word: Word  # what it amounts to among all strata
    look: int  # at its samples, from 1: each has twice the samples of the one before
    # How many times the samples would decide an inconclusive one; infinite: its ratio lies on the margin.
    times: float
    detectable: float  # a ratio from here on would have been called degraded, nine times of ten
    candidate_error: float  # root mean square, over that of the exact result
    reference_error: float  # likewise

    @property
    def measured(self) -> bool:
        """Whether there is a ratio: not where sums overflow in all samples."""
        return math.isfinite(self.ratio)

    def __str__(self) -> str:
        where = f"{self.family} at {self.n_kv:,} keys" + (f", {self.heads}" if self.heads else "")
        return f"{where}: {self.ratio:.3g} ({self.low:.3g} to {self.high:.3g})"


class Judgement(NamedTuple):
    """All strata of a pair: each one's result, and what they amount to together."""

    strata: list[StratumResult]
    word: Word
    margin: float

    def of(self, word: Word) -> list[StratumResult]:
        return [s for s in self.strata if s.word == word]

    def only(self, shape: str, n_kv: int) -> Judgement:
        """The same of one shape and length: each stratum keeps the word that it has among all."""
        strata = [s for s in self.strata if (s.shape, s.n_kv) == (shape, n_kv)]
        return Judgement(strata, _gravest(strata), self.margin)

    @property
    def telling(self) -> StratumResult | None:
        """The stratum that the word rests on most: farthest beyond, or nearest to the margin."""
        meant = self.of(self.word)
        if self.word == "improved":
            return min(meant, key=lambda s: s.high, default=None)
        return max(meant, key=lambda s: s.low if self.word == "degraded" else s.high, default=None)

    @property
    def times(self) -> float:
        """How many times the samples of a first look would decide what is inconclusive, infinite where
        nothing tells."""
        return max((s.times * 2 ** (s.look - 1) for s in self.of("inconclusive")), default=1.0)


def judge_strata(strata: Sequence[Stratum], margin: float) -> Judgement:
    """Judge all strata of a pair together.

    A stratum in which only the candidate's sums overflow is degraded, whatever the others of its samples say.

    Heads that differ are strata of their own: groups of them are found on one half of the samples of a
    stratum's first look and judged on all others, so that the choice costs no error rate.
    """
    parts = [part for stratum in _with_typical_floor(strata) for part in _by_heads(stratum)]
    tested = [p for p in parts if not p.equal and len(p.candidate) > 1]
    ratios = _ratios(tested)
    worse, better = (
        holm(
            np.array(
                [
                    float(r.chance(math.log(bound), sign)) / p.share
                    for r, p in zip(ratios, tested, strict=True)
                ]
            )
        )
        for bound, sign in ((margin, 1), (improvement_of(margin), -1))
    )
    found: list[StratumResult] = []
    at = 0
    for part in parts:
        if part.equal:
            found.append(_result(part, "equal", (1.0, 1.0, 1.0), 1.0, margin))
            continue
        if len(part.candidate) < 2:
            c, b = part.energies()
            one = math.sqrt(float(c.sum() / b.sum())) if len(c) else math.inf, 0.0, math.inf
            few: Word = "degraded" if part.overflows else "inconclusive"
            found.append(_result(part, few, one, math.inf, margin if part.overflows else math.inf))
            continue
        ratio = ratios[at]
        alpha = ALPHA * part.share
        low, high = (math.exp(min(float(ratio.limit(sign, alpha)), 700.0)) for sign in (-1, 1))
        word: Word = "round-off" if high <= margin else "inconclusive"
        if better[at]:
            word = "improved"
        if worse[at] or part.overflows:
            word = "degraded"
        times = _times(ratio, margin, len(tested), alpha) if word == "inconclusive" else 1.0
        reach = student_quantile(1 - alpha / len(tested), ratio.degrees) + normal_quantile(POWER)
        detectable = margin * math.exp(min(float(reach * ratio.se), 700.0))
        found.append(_result(part, word, (math.exp(float(ratio.value)), low, high), times, detectable))
        at += 1
    return Judgement(found, _gravest(found), margin)


def _gravest(found: Sequence[StratumResult]) -> Word:
    return min((s.word for s in found), key=GRAVITY.index, default="inconclusive")


def _with_typical_floor(strata: Sequence[Stratum]) -> list[Stratum]:
    """The same, the floor raised to what is negligible beside the reference's typical error at the length.

    That is no matter of which other kinds were asked. Files of before do not have it: there it is that of the
    plain inputs, if they were asked, else the stratum's own.
    """
    plain = {(s.shape, s.n_kv): _relative(s) for s in strata if s.family.split(",")[0] == PLAIN}
    found = []
    for s in strata:
        typical = s.typical or plain.get((s.shape, s.n_kv)) or _relative(s)
        least = typical / NEGLIGIBLE**2 * float(s.power.mean()) if len(s.power) else 0.0
        found.append(replace(s, floor=np.maximum(s.floor, least)))
    return found


def _relative(s: Stratum) -> float:
    """The reference's mean square error over the mean square of the result; 0 where there is none."""
    power = float(s.power.sum())
    return float(s.reference.sum()) / power if power > 0 else 0.0


def _ratios(tested: Sequence[Stratum]) -> list[LogRatio]:
    """ln R of each; strata of few samples borrow dispersion from their family."""
    own = [_own_dispersion(part) if len(part.candidate) < FEWEST_SAMPLES else 0.0 for part in tested]
    found = []
    for i, part in enumerate(tested):
        n = len(part.candidate)
        borrowed = (0.0, 0.0)
        if n < FEWEST_SAMPLES:
            others = [
                (len(other.candidate) - 1, own[j])
                for j, other in enumerate(tested)
                if j != i
                and (other.shape, other.family) == (part.shape, part.family)
                and math.isfinite(own[j])
                and len(other.candidate) < FEWEST_SAMPLES
            ]
            degrees = sum(weight for weight, _ in others)
            if degrees:
                pooled = sum(weight * x for weight, x in others) / degrees
                borrowed = (pooled, float(min(FEWEST_SAMPLES - n, degrees)))
        found.append(log_ratio(*part.energies(), borrowed=borrowed))
    return found


def _own_dispersion(part: Stratum) -> float:
    candidate, reference = part.energies()
    return float(
        _dispersion(candidate, reference, [candidate.sum(keepdims=True), reference.sum(keepdims=True)])
    )


def _times(ratio: LogRatio, margin: float, tests: int, alpha: float) -> float:
    """How many times the samples would put the margin outside of the interval, the ratio staying as it is."""
    away = math.log(margin) - float(ratio.value)
    alpha = alpha if away > 0 else alpha / tests
    reach = float(student_quantile(1 - alpha, ratio.degrees)) * float(ratio.se)
    return (reach / away) ** 2 if abs(away) > 1e-3 else math.inf


def _result(
    part: Stratum, word: Word, ratio: tuple[float, float, float], times: float, detectable: float
) -> StratumResult:
    power = max(float(part.power.sum()), np.finfo(float).tiny)
    return StratumResult(
        shape=part.shape,
        n_kv=part.n_kv,
        family=part.family,
        heads=heads_in_words(part.heads, part.a_kv_head),
        samples=len(part.candidate),
        ratio=ratio[0],
        low=ratio[1],
        high=ratio[2],
        word=word,
        look=part.look,
        times=times,
        detectable=detectable,
        candidate_error=math.sqrt(float(part.candidate.sum()) / power),
        reference_error=math.sqrt(float(part.reference.sum()) / power),
    )


def _by_heads(stratum: Stratum) -> list[Stratum]:
    """The stratum, or its other samples by groups of heads where they differ."""
    unnamed = replace(stratum, heads=())
    count = len(stratum.candidate)
    first = count if stratum.first is None else stratum.first
    if len(stratum.heads) < 2 or first < 2 * FEWEST_TO_SPLIT or stratum.equal:
        return [unnamed]
    groups = head_groups(stratum.part(range(0, first, 2), range(len(stratum.heads))))
    if len(groups) < 2:
        return [unnamed]
    others = [*range(1, first, 2), *range(first, count)]
    return [stratum.part(others, group) for group in groups]


def head_groups(stratum: Stratum) -> list[list[int]]:
    """Heads by like ratios: split at the widest gap of ln R while the two sides differ by more than
    HEAD_FACTOR and chance allows, in at most MOST_HEAD_GROUPS."""
    least = np.finfo(float).tiny
    c, b = (np.maximum(x + stratum.floor, least).T for x in (stratum.candidate, stratum.reference))
    values = log_ratio(c, b).value  # of each head
    groups = [list(np.argsort(values, kind="stable"))]
    while len(groups) < MOST_HEAD_GROUPS:
        found = [
            (float(values[group[i]] - values[group[i - 1]]), g, i)
            for g, group in enumerate(groups)
            for i in range(1, len(group))
        ]
        gap, g, i = max(found, default=(0.0, 0, 0))
        if gap <= math.log(HEAD_FACTOR):
            break
        sides = [log_ratio(c[side].mean(0), b[side].mean(0)) for side in (groups[g][:i], groups[g][i:])]
        apart = float(sides[1].value - sides[0].value) / math.hypot(float(sides[0].se), float(sides[1].se))
        degrees = min(float(side.degrees) for side in sides)
        if student_below(-apart, degrees) > HEAD_CHANCE:
            break
        groups[g : g + 1] = [groups[g][:i], groups[g][i:]]
    return [sorted(int(h) for h in group) for group in groups]


def heads_in_words(heads: Sequence[int], a_kv_head: int) -> str:
    """`heads 8 to 11 of each KV head` or `heads 0 to 3, 7`; nothing where none are named."""
    if not heads:
        return ""
    inner = sorted({h % a_kv_head for h in heads})
    kv_heads = sorted({h // a_kv_head for h in heads})
    of_each = len(inner) * len(kv_heads) == len(heads) and len(inner) < a_kv_head and len(kv_heads) > 1
    named = inner if of_each else sorted(heads)
    runs: list[list[int]] = []
    for h in named:
        if runs and runs[-1][-1] == h - 1:
            runs[-1].append(h)
        else:
            runs.append([h])
    spans = [str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs]
    words = f"head{'s' if len(named) > 1 else ''} {', '.join(spans)}"
    return f"{words} of each KV head" if of_each else words
