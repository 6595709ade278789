"""What two logits files amount to: what 16 bits resolve, intervals, top-1 changes by margin, a verdict.

Two files show that two programs differ, not which of them is nearer to exact: beyond the files' rounding the
verdict is `inconclusive`, unless the text's own perplexity moved significantly, or a limit was given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from verify.engines.divergence import FileScores, PairScores, clip_width
from verify.engines.kld_table import Table, table_of
from verify.judge.chances import normal_quantile
from verify.judge.statistics import CONFIDENCE, Interval, window_interval
from verify.judge.verdict import Decision

# Edges in nats between classes of margin; the first class ends at the step of the codes.
MARGIN_EDGES = (0.01, 0.1, 1.0)
QUARTERS = 4
WORST_TOKENS = 3


class Resolution(NamedTuple):
    """What the records' 16 bits leave unseen, at CONFIDENCE; in nats."""

    step: float  # of the codes, the median
    token_nll: float  # of one token, the median
    token_kld: float  # of one token, the median
    mean_nll: float  # of the mean over all tokens
    mean_kld: float  # of the mean over all tokens
    negative: int  # tokens whose divergence is below zero, which no true one is


class Class(NamedTuple):
    """Tokens of one kind, and how many of them changed their most likely token."""

    name: str
    tokens: int
    changed: int
    dnll: float
    kld: float


class Token(NamedTuple):
    """One scored token; window and position are counted from 0."""

    window: int
    position: int
    kld: float
    nll_base: float
    nll: float


class Comparison(NamedTuple):
    """Two files: everything that is said about them. None and empty where a record is not a number."""

    decision: Decision  # verdict and reasons
    # What llama-perplexity prints.
    table: Table | None = None
    # What 16 bits leave unseen.
    resolution: Resolution | None = None
    # Intervals of ln PPL(Q)/PPL(base) and of the mean divergence.
    dnll: Interval | None = None
    kld: Interval | None = None  # of the mean divergence
    # ln PPL(Q)/PPL(base) and mean divergence, a window.
    windows: Sequence[tuple[float, float]] = ()
    # Tokens by the base's margin, and by their visible keys.
    by_margin: Sequence[Class] = ()
    by_position: Sequence[Class] = ()  # by visible keys
    # The largest divergences.
    worst: Sequence[Token] = ()
    # The narrower clip where the files' are unlike, and tokens that came and lie at it in either file.
    clip: float | None = None
    at_clip: int = 0  # tokens that came and lie there


def compare(pair: PairScores, *, first_scored: int, max_kld: float | None = None) -> Comparison:
    """Conclusions about a pair. max_kld: a mean divergence that still is round-off; beyond it is degraded."""
    for name, scores in (("BASE", pair.base), ("OTHER", pair.other)):
        if not scores.finite.all():
            window, index = (int(x) for x in np.argwhere(~scores.finite)[0])
            reason = (
                f"{name}: {int((~scores.finite).sum())} of {scores.finite.size} records hold NaN or Inf,"
                f" first in window {window + 1} at position {first_scored + index}"
            )
            return Comparison(Decision("broken", [reason]))
    pair = pair.on_what_both_hold
    difference = pair.other.nll - pair.base.nll
    dnll, kld = window_interval(difference), window_interval(pair.kld)
    resolution = resolution_of(pair)
    return Comparison(
        decision=_decide(pair, dnll, kld, resolution, max_kld),
        table=table_of(pair),
        resolution=resolution,
        dnll=dnll,
        kld=kld,
        windows=[(float(a), float(b)) for a, b in zip(difference.mean(1), pair.kld.mean(1), strict=True)],
        by_margin=by_margin(pair, difference),
        by_position=by_position(pair, difference, first_scored),
        worst=worst_tokens(pair, first_scored),
        clip=pair.clip,
        at_clip=int((pair.base.clipped | pair.other.clipped).sum()),
    )


def bounds_text(kld: Interval) -> str:
    """The interval of a mean divergence. None is below zero, so a negative lower end is no bound."""
    if math.isinf(kld.high):
        return "too little data for an interval"
    if kld.low <= 0:
        return f"99.9 %: at most {kld.high:.3g}"
    return f"99.9 % interval {kld.low:.3g} to {kld.high:.3g}"


def resolution_of(pair: PairScores) -> Resolution:
    """The rounding of two files, taken as independent, at CONFIDENCE; second-order terms are step^2 / 12."""
    z = normal_quantile((1 + CONFIDENCE) / 2)
    n = pair.kld.size
    bias = float((pair.base.step**2 + pair.other.step**2).mean()) / 12
    return Resolution(
        step=float(np.median(np.maximum(pair.base.step, pair.other.step))),
        token_nll=z * float(np.median(pair.nll_floor)),
        token_kld=z * float(np.median(pair.kld_floor)),
        mean_nll=z * math.sqrt(float((pair.nll_floor**2).sum())) / n,
        mean_kld=z * math.sqrt(float((pair.kld_floor**2).sum())) / n + bias,
        negative=int((pair.kld < 0).sum()),
    )


def by_margin(pair: PairScores, difference: np.ndarray) -> list[Class]:
    """Tokens by how far the base's most likely token stands above its second, in nats."""
    margin = pair.base.margin
    edges = [float(np.median(pair.base.step)), *MARGIN_EDGES]
    bounds = [0.0, *(e for i, e in enumerate(edges) if i == 0 or e > edges[0]), math.inf]
    found = []
    for low, high in pairwise(bounds):
        name = f"{low:.2g} to {high:.2g}" if low and high < math.inf else f"from {low:g}"
        chosen = (margin >= low) & (margin < high)
        found.append(_class(name if low else f"below {high:.2g}", pair, difference, chosen))
    return found


def by_position(pair: PairScores, difference: np.ndarray, first_scored: int) -> list[Class]:
    """Tokens by their visible keys, in quarters of the scored half."""
    scored = pair.kld.shape[1]
    bounds = [round(i * scored / QUARTERS) for i in range(QUARTERS + 1)]
    index = np.broadcast_to(np.arange(scored), pair.kld.shape)
    return [
        _class(
            f"n_kv {first_scored + a + 1} to {first_scored + b}",
            pair,
            difference,
            (index >= a) & (index < b),
        )
        for a, b in pairwise(bounds)
        if b > a
    ]


def worst_tokens(pair: PairScores, first_scored: int) -> list[Token]:
    """The tokens with the largest divergences."""
    scored = pair.kld.shape[1]
    return [
        Token(
            int(i) // scored,
            first_scored + int(i) % scored,
            float(pair.kld.flat[i]),
            float(pair.base.nll.flat[i]),
            float(pair.other.nll.flat[i]),
        )
        for i in np.argsort(pair.kld, axis=None)[::-1][:WORST_TOKENS]
    ]


def file_json(path: str, scores: FileScores) -> dict[str, Any]:
    """What is said of one file."""
    return {
        "path": path,
        "clip_width": clip_width(scores),
        "step_median": float(np.median(scores.step)),
        "targets_clipped": int(scores.clipped.sum()),
        "top1_undecided": int((scores.margin == 0).sum()),
        "tokens": int(scores.nll.size),
    }


def comparison_json(path: str, c: Comparison) -> dict[str, Any]:
    """One pair, as `run.json` holds it."""

    def classes(found: Sequence[Class]) -> list[dict[str, Any]]:
        return [x._asdict() for x in found]

    table = c.table
    return {
        "candidate": path,
        "verdict": c.decision.verdict,
        "reasons": c.decision.reasons,
        "table": {k: v._asdict() if hasattr(v, "_asdict") else v for k, v in table._asdict().items()}
        if table
        else None,
        "resolution": c.resolution._asdict() if c.resolution else None,
        "dlnppl": c.dnll._asdict() if c.dnll else None,
        "kld": {**c.kld._asdict(), "low": c.kld.low if c.kld.low > 0 else None} if c.kld else None,
        "common_clip": c.clip,
        "targets_at_common_clip": c.at_clip if c.clip is not None else None,
        "windows": [{"dlnppl": a, "kld_mean": b} for a, b in c.windows],
        "by_margin": classes(c.by_margin),
        "by_position": classes(c.by_position),
        "worst": [x._asdict() for x in c.worst],
    }


def _class(name: str, pair: PairScores, difference: np.ndarray, chosen: np.ndarray) -> Class:
    n = int(chosen.sum())
    changed = int((pair.base.top1 != pair.other.top1)[chosen].sum())
    if not n:
        return Class(name, 0, 0, math.nan, math.nan)
    return Class(name, n, changed, float(difference[chosen].mean()), float(pair.kld[chosen].mean()))


def _decide(
    pair: PairScores, dnll: Interval, kld: Interval, resolution: Resolution, max_kld: float | None
) -> Decision:
    if pair.same.all():
        return Decision("identical", [f"all {pair.same.size} records are equal to the bit"])
    divergence = f"mean KLD {kld.mean:.3g} ({bounds_text(kld)})"
    if max_kld is not None:
        said = f"{divergence}, --max-kld {max_kld:g}"
        return Decision("round-off" if kld.mean <= max_kld else "degraded", [said])
    reach = f"99.9 % interval {dnll.low:+.3g} to {dnll.high:+.3g}"
    if math.isinf(dnll.high):
        reach = "too little data for an interval"
    moved = f"ln PPL moved by {dnll.mean:+.3g} ({reach})"
    # A shift that 16 bits could make is none, however steady.
    shifted = abs(dnll.mean) > resolution.mean_nll
    if shifted and dnll.low > 0:
        return Decision("degraded", [f"{moved}: the text is predicted worse", divergence])
    if shifted and dnll.high < 0:
        return Decision("improved", [f"{moved}: the text is predicted better", divergence])
    if abs(kld.mean) <= resolution.mean_kld:
        return Decision(
            "round-off",
            [f"{divergence}: no more than the files' own rounding, {resolution.mean_kld:.2g}", moved],
        )
    return Decision(
        "inconclusive",
        [
            f"{divergence}: beyond the files' own rounding, {resolution.mean_kld:.2g}; two files cannot say"
            " which is nearer to exact: verify ppl --against, or set --max-kld",
            moved,
        ],
    )
