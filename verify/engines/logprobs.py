"""What two programs' logprobs of the same tokens amount to: divergence, importance ratios, where they part.

Intervals are over sequences, which are independent; the mean of all tokens is a ratio of two sums, so with
e_i = sum over sequence i of (x - mean) and N tokens in n sequences

    se^2 = n / (n - 1) sum e_i^2 / N^2          Student's t with n - 1 degrees of freedom

Under 8 sequences blocks of 64 tokens stand for them, the standard error is widened by 1.2, and the interval
speaks about these sequences only.

The floor, where a repeat C of A is given: the ratio of rms(ln b - ln a) to rms(ln c - ln a), by the jackknife
over sequences on its logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from verify.engines.conclusion import bounds_text
from verify.engines.logprob_files import Columns, LogprobFile
from verify.judge.chances import student_quantile
from verify.judge.statistics import BLOCK_WIDENING, CONFIDENCE, WINDOWS_FOR_T, Interval
from verify.judge.strata import IMPROVEMENT
from verify.judge.verdict import DEFAULT_MARGIN, Decision, Verdict

QUARTERS = 4
# Tokens that stand for a sequence where there are few.
BLOCK = 64
# A ratio of probabilities that trainers clip beyond.
CLIP = 0.2


class Ratios(NamedTuple):
    """Importance ratios w = b / a of the tokens that came, a the rollout's probability, b the trainer's."""

    # Of w over the tokens; 1 in the mean where the tokens were sampled from a.
    mean: float
    sd: float  # standard deviation
    least: float  # of a token
    most: float  # of a token
    # (sum w)^2 / (n sum w^2): the share of the tokens that are as good as unweighted ones.
    effective: float
    # Share of tokens with |w - 1| beyond CLIP.
    clipped: float
    # Of ln w summed over a sequence.
    sequence_mean: float
    sequence_sd: float  # standard deviation


class Departure(NamedTuple):
    """A token at which two files part. sequence and position are counted from 0."""

    sequence: int
    position: int
    moved: float


class Quarter(NamedTuple):
    """Tokens of a part of their sequences."""

    name: str
    tokens: int
    divergence: float
    rms: float


class FloorRatio(NamedTuple):
    """rms of b against a over that of a's own repeat, with its interval; infinite where that is 0."""

    ratio: float
    low: float
    high: float


class LogprobComparison(NamedTuple):
    """Two files: everything that is said of them."""

    decision: Decision  # verdict and reasons
    columns: Columns  # by token
    tokens: int  # compared
    divergence: Interval  # mean KL(a, b) in nats a token, or its estimate
    # Of the bound that truncation leaves, and the probability that it hides; None for sampled tokens.
    bound: Interval | None
    hidden: float | None  # None for sampled tokens
    ratios: Ratios  # importance ratios
    # Root mean square and largest of |ln b - ln a|.
    rms: float
    largest: Departure  # and where
    # The first token that moved beyond the floor's largest move (at all, where there is no floor).
    first: Departure | None
    floor: FloorRatio | None  # against a third file; None: there is none
    by_position: Sequence[Quarter]  # in quarters


def compare_logprobs(
    a: LogprobFile,
    columns: Columns,
    floor: Columns | None = None,
    *,
    max_kld: float | None = None,
    sampled_from_a: bool = True,
    margin: float = DEFAULT_MARGIN,
) -> LogprobComparison:
    """Conclusions about two files of the same tokens.

    floor: a and its own repeat. sampled_from_a: whether the tokens are draws from a; where they are a given
    text, truncated files have a bound alone.
    """
    moved = np.concatenate(columns.moved)
    ratio = floor_ratio(columns.moved, floor.moved) if floor is not None else None
    largest_floor = max((float(np.abs(x).max(initial=0)) for x in floor.moved), default=0.0) if floor else 0.0
    exact = columns.kind == "full" or sampled_from_a or columns.bound is None
    divergence = clustered_interval(columns.divergence if exact else columns.bound or [])
    bound = clustered_interval(columns.bound) if columns.bound is not None else None
    return LogprobComparison(
        decision=_decide(moved, divergence, ratio, max_kld, margin, columns, sampled_from_a),
        columns=columns,
        tokens=len(moved),
        divergence=divergence,
        bound=bound,
        hidden=float(np.concatenate(columns.hidden).mean()) if columns.hidden is not None else None,
        ratios=ratios_of(columns.moved),
        rms=math.sqrt(float((moved**2).mean())),
        largest=_largest(columns.moved),
        first=_first_beyond(columns.moved, largest_floor),
        floor=ratio,
        by_position=_by_position(columns, a.before),
    )


def clustered_interval(values: Sequence[np.ndarray], confidence: float = CONFIDENCE) -> Interval:
    """Interval of the mean over all tokens of values by sequence (see the module's text)."""
    total = sum(map(len, values))
    mean = sum(float(x.sum()) for x in values) / total
    clusters, widening, scope = list(values), 1.0, "texts like these"
    if len(values) < WINDOWS_FOR_T:
        widening, scope = BLOCK_WIDENING, "these sequences only"
        clusters = [b for x in values for b in np.array_split(x, max(len(x) // BLOCK, 1))]
    n = len(clusters)
    if n < 2:
        return Interval(mean=mean, low=-math.inf, high=math.inf, se=math.inf, degrees=0, scope=scope)
    errors = np.array([float((x - mean).sum()) for x in clusters])
    se = widening * math.sqrt(n / (n - 1) * float((errors**2).sum())) / total
    reach = float(student_quantile((1 + confidence) / 2, n - 1)) * se
    return Interval(mean=mean, low=mean - reach, high=mean + reach, se=se, degrees=n - 1, scope=scope)


def floor_ratio(
    moved: Sequence[np.ndarray], floor: Sequence[np.ndarray], confidence: float = CONFIDENCE
) -> FloorRatio:
    """How much farther b lies from a than a's own repeat does."""
    pairs = list(zip(moved, floor, strict=True))
    if len(pairs) < WINDOWS_FOR_T:
        pairs = [
            pair
            for x, y in pairs
            for pair in zip(*(np.array_split(z, max(len(x) // BLOCK, 1)) for z in (x, y)), strict=True)
        ]
    squares = np.array([[float((x**2).sum()), float((y**2).sum())] for x, y in pairs])
    b, c = squares.sum(0)
    if not c:
        return FloorRatio(math.inf if b else 1.0, math.inf if b else 1.0, math.inf if b else 1.0)
    n = len(squares)
    left = squares.sum(0) - squares
    if n < 2 or not (left > 0).all():
        ratio = math.sqrt(b / c)
        return FloorRatio(ratio, 0.0, math.inf)
    logs = np.log(left[:, 0] / left[:, 1]) / 2
    se = math.sqrt((n - 1) / n * float(((logs - logs.mean()) ** 2).sum()))
    reach = float(student_quantile((1 + confidence) / 2, n - 1)) * se
    center = math.log(b / c) / 2
    return FloorRatio(
        math.exp(center), math.exp(min(center - reach, 700)), math.exp(min(center + reach, 700))
    )


def decide_beside_exact(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], margin: float = DEFAULT_MARGIN
) -> tuple[Decision, FloorRatio, float, float]:
    """Which of two files is nearer to exact attention: a, b are their ln p less exact's, by sequence.

    Returns the verdict, rms(b) / rms(a) with its interval, and the two root mean squares.
    """
    ratio = floor_ratio(b, a)
    rms = [math.sqrt(float((np.concatenate(list(x)) ** 2).mean())) for x in (a, b)]
    said = (
        f"B lies {ratio.ratio:.3g} times as far from exact attention as A ({ratio.low:.3g} to"
        f" {ratio.high:.3g}; {rms[1]:.2g} and {rms[0]:.2g} nats, rms)"
    )
    if ratio.low > margin:
        verdict: Verdict = "degraded"
    elif ratio.high < 1 / IMPROVEMENT:
        verdict = "improved"
    else:
        verdict = "round-off" if ratio.high <= margin else "inconclusive"
    return Decision(verdict, [said]), ratio, rms[0], rms[1]


def ratios_of(moved: Sequence[np.ndarray]) -> Ratios:
    """Moments of the importance ratios exp(moved)."""
    w = np.exp(np.concatenate(list(moved)))
    sums = np.array([float(x.sum()) for x in moved])
    return Ratios(
        mean=float(w.mean()),
        sd=float(w.std()),
        least=float(w.min()),
        most=float(w.max()),
        effective=float(w.sum() ** 2 / (len(w) * (w**2).sum())),
        clipped=float((np.abs(w - 1) > CLIP).mean()),
        sequence_mean=float(sums.mean()),
        sequence_sd=float(sums.std()),
    )


def comparison_json(c: LogprobComparison) -> dict[str, Any]:
    """One pair, as `verify logprobs --json` prints it."""

    def interval(x: Interval | None) -> dict[str, Any] | None:
        return None if x is None else {**x._asdict(), "low": x.low if x.low > 0 else None}

    return {
        "verdict": c.decision.verdict,
        "reasons": c.decision.reasons,
        "kind": c.columns.kind,
        "tokens": c.tokens,
        "sequences": len(c.columns.moved),
        "kld": interval(c.divergence),
        "kld_bound": interval(c.bound),
        "hidden": c.hidden,
        "ratios": c.ratios._asdict(),
        "rms": c.rms,
        "largest": c.largest._asdict(),
        "first": c.first._asdict() if c.first else None,
        "floor": c.floor._asdict() if c.floor else None,
        "by_position": [q._asdict() for q in c.by_position],
    }


def _decide(
    moved: np.ndarray,
    divergence: Interval,
    floor: FloorRatio | None,
    max_kld: float | None,
    margin: float,
    columns: Columns,
    sampled_from_a: bool,
) -> Decision:
    if not moved.any() and not any(x.any() for x in columns.divergence):
        return Decision("identical", [f"all {len(moved)} logprobs are the same numbers"])
    what = "KL(A, B)"
    if columns.kind != "full":
        what += " if the tokens were sampled from A" if sampled_from_a else ", its lower bound,"
    said = f"{what} {divergence.mean:.3g} nats a token ({bounds_text(divergence)})"
    if max_kld is not None:
        limit = f"{said}, --max-kld {max_kld:g}"
        if divergence.high <= max_kld:
            return Decision("round-off", [limit])
        if divergence.low > max_kld:
            return Decision("degraded", [limit])
        return Decision("inconclusive", [f"{limit} lies inside the interval: more tokens narrow it"])
    if floor is None and columns.resolution is not None and abs(divergence.mean) <= columns.resolution:
        return Decision(
            "round-off", [f"{said}: no more than the files' own rounding, {columns.resolution:.2g}"]
        )
    if floor is None:
        return Decision(
            "inconclusive",
            [
                f"{said}: two files cannot say whether that is rounding; give a repeat of A as a third file,"
                " a model (-m), a ladder (--ladder), or --max-kld"
            ],
        )
    reach = f"{floor.low:.3g} to {floor.high:.3g}"
    against = f"B lies {floor.ratio:.3g} times as far from A as A's own repeat ({reach})"
    if floor.high <= margin:
        return Decision("round-off", [f"{against}: inside the margin of {margin:g}", said])
    if floor.low > margin:
        return Decision("inconclusive", [f"{against}: beyond what A does by itself; {said}"])
    return Decision("inconclusive", [f"{against}: it reaches the margin of {margin:g}; more tokens", said])


def _largest(moved: Sequence[np.ndarray]) -> Departure:
    best = max(range(len(moved)), key=lambda i: float(np.abs(moved[i]).max(initial=0)))
    at = int(np.abs(moved[best]).argmax())
    return Departure(best, at, float(moved[best][at]))


def _first_beyond(moved: Sequence[np.ndarray], most: float) -> Departure | None:
    """The earliest position of any sequence that moved by more than `most`."""
    found = []
    for i, x in enumerate(moved):
        beyond = np.abs(x) > most
        if beyond.any():
            at = int(beyond.argmax())
            found.append(Departure(i, at, float(x[at])))
    return min(found, key=lambda d: (d.position, d.sequence), default=None)


def _by_position(columns: Columns, before: Sequence[int] | None) -> list[Quarter]:
    """Tokens by where they stand: n_kv where the prompts' lengths are known, else the position."""
    known = before is not None and all(b >= 0 for b in before)
    starts = list(before) if known and before is not None else [0] * len(columns.moved)
    at = np.concatenate([s + np.arange(len(x)) for s, x in zip(starts, columns.moved, strict=True)])
    moved, divergence = np.concatenate(columns.moved), np.concatenate(columns.divergence)
    edges = np.unique(np.quantile(at, np.linspace(0, 1, QUARTERS + 1)).round().astype(int))
    edges[-1] += 1
    found = []
    for low, high in pairwise(edges):
        mine = (at >= low) & (at < high)
        if mine.any():
            name = f"{'n_kv' if known else 'position'} {low} to {high - 1}"
            rms = math.sqrt(float((moved[mine] ** 2).mean()))
            found.append(Quarter(name, int(mine.sum()), float(divergence[mine].mean()), rms))
    return found
