"""Regimes: lengths at which a kernel is another kernel, and the sentence that names them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from verify.judge.strata import GRAVITY, Judgement, StratumResult, Word

# Neighbouring lengths whose ratios differ by more are different regimes.
REGIME_FACTOR = 2.0


class Boundary(NamedTuple):
    """A regime ends: between these lengths R jumps, because the kernel of `whose` changes."""

    below: int
    above: int
    whose: str


def boundaries(strata: Sequence[StratumResult]) -> list[Boundary]:
    """Where neighbouring lengths are different regimes, of one shape's strata.

    In half of the families or more, R differs by more than REGIME_FACTOR and the intervals lie apart. Whose
    kernel changed, each one's own relative error tells: the one that moves at least twice as far.
    """
    lengths = sorted({s.n_kv for s in strata})
    found = []
    for below, above in pairwise(lengths):
        here, there = ({(s.family, s.heads): s for s in strata if s.n_kv == n} for n in (below, above))
        shared = [(here[key], there[key]) for key in here if key in there]
        shared = [(a, b) for a, b in shared if not (a.word == b.word == "equal")]
        jumps = [(a, b) for a, b in shared if _apart(a, b)]
        if jumps and len(jumps) * 2 >= len(shared):
            found.append(Boundary(below, above, _whose(jumps)))
    return found


def _apart(a: StratumResult, b: StratumResult) -> bool:
    # Where one of the two errs by nothing R may be 0, and the quotient of two be 0 or past any number.
    a_log, b_log = (math.log(max(of.ratio, sys.float_info.min)) for of in (a, b))
    far = abs(a_log - b_log) > math.log(REGIME_FACTOR)
    return far and (a.high < b.low or b.high < a.low)


def _whose(jumps: Sequence[tuple[StratumResult, StratumResult]]) -> str:
    """`candidate`, `baseline`, or `both`: whose relative error moves, in the median over families."""
    moves = []
    for name in ("candidate_error", "reference_error"):
        least = 1e-30
        each = [abs(math.log(max(getattr(b, name), least) / max(getattr(a, name), least))) for a, b in jumps]
        moves.append(float(np.median(each)))
    if moves[0] > 2 * moves[1]:
        return "candidate"
    return "baseline" if moves[1] > 2 * moves[0] else "both"


def sentence(judgement: Judgement) -> str:
    """One sentence that names the regimes, shape by shape."""
    shapes = list(dict.fromkeys(s.shape for s in judgement.strata))
    said = {shape: _of_shape([s for s in judgement.strata if s.shape == shape]) for shape in shapes}
    if len(set(said.values())) == 1:
        return next(iter(said.values()), "nothing was compared")
    return "; ".join(f"{shape}: {text}" for shape, text in said.items())


class _Segment(NamedTuple):
    """Neighbouring lengths of which the same is said: figures are the medians at the first and the last."""

    word: Word
    lengths: list[int]
    ratios: list[float]
    families: list[str]
    heads: list[str]


def _of_shape(strata: Sequence[StratumResult]) -> str:
    lengths = sorted({s.n_kv for s in strata})
    ends = {b.below: b for b in boundaries(strata)}
    segments: list[_Segment] = []
    for n in lengths:
        here = [s for s in strata if s.n_kv == n]
        word = min((s.word for s in here), key=GRAVITY.index)
        # Where one stratum suffices to be degraded or inconclusive, it is named; others speak for all.
        meant = [s for s in here if s.word == word]
        ratio = float(np.median([s.ratio for s in meant]))
        named = word not in ("round-off", "equal") and len(meant) < len(here)
        families = list(dict.fromkeys(s.family for s in meant)) if named else []
        heads = sorted({s.heads for s in meant if s.heads})
        joined = segments and segments[-1].word == word and segments[-1].lengths[-1] not in ends
        if joined:
            last = segments[-1]
            last.lengths.append(n)
            last.ratios.append(ratio)
            last.families.extend(f for f in families if f not in last.families)
            last.heads.extend(h for h in heads if h not in last.heads)
        else:
            segments.append(_Segment(word, [n], [ratio], families, heads))
    text = ", ".join(_segment(s, last=s is segments[-1], first=s is segments[0]) for s in segments)
    return text + _why(list(ends.values()))


def _segment(s: _Segment, *, first: bool, last: bool) -> str:
    a, b = s.lengths[0], s.lengths[-1]
    where = f"at {a:,} keys" if a == b else f"at {a:,} to {b:,} keys"
    if last and not first and a != b:
        where = f"from {a:,} keys"
    few = f" ({', '.join(s.families[:3])}{', ...' if len(s.families) > 3 else ''})" if s.families else ""
    who = f" for {' and '.join(s.heads[:2])}" if s.heads else ""
    if s.word == "equal":
        return f"equal {where}"
    x, y = s.ratios[0], s.ratios[-1]
    if not (math.isfinite(x) and math.isfinite(y)):
        return f"{s.word} {where}{who}{few}"
    if s.word in ("degraded", "improved") and (min(x, y) >= 2 or max(x, y) <= 0.5):
        times = sorted(f"{r if r >= 1 else 1 / r:.2g}" for r in (x, y))
        each = times[0] if times[0] == times[1] else f"{times[0]} to {times[1]}"
        return f"{s.word} {each} times {where}{who}{few}"
    size = f"{x:.2g}" if f"{x:.2g}" == f"{y:.2g}" else f"{x:.2g} to {y:.2g}"
    return f"{s.word} {where}{who} ({size}{'; ' + few[2:-1] if few else ''})"


def _why(ends: Sequence[Boundary]) -> str:
    """Whose kernel changes at each boundary."""
    if not ends:
        return ""
    called = {
        "candidate": "the candidate's own kernel changes",
        "baseline": "the baseline's own kernel changes",
        "both": "both kernels change",
    }
    if len(ends) == 1:
        return f": {called[ends[0].whose]} between"
    return ": " + ", ".join(f"{called[e.whose]} between {e.below:,} and {e.above:,}" for e in ends)
