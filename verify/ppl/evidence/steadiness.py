"""Free-running passes reach the verdict: a kernel that errs on calls that nobody measured.

Calls of an arm that runs freely are judged nowhere by themselves, and one bad call in 34 leaves no trace in
the frozen distance. So the free-running divergence F of a candidate is held against what explains it,

    F_c > 4 (max(F_floor, F_baseline) + 4 K_c)         K_c: its divergence with casts frozen

and where it is more, against NOISE_ARMS arms besides, exact attention with one rounding of noise each: F is
heavy tailed, and where a model chooses (experts), rare flips of a choice hold most of it. Then it must be
more with those in the maximum, and either more again with the largest TRIMMED of the tokens of each window
left out of every arm, or beyond the largest token of every noise arm on more than TRIMMED of all tokens. A
flip is a token here and there; a call that went wrong is all of a window from there on, so trimming within
windows loses none, though it be one window of hundreds.

What is left is asked again: the calls of the worst window, several times each. One that is not steady is a
bug, with its place; without one the run is `inconclusive`, and never ends with 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from verify.ppl.evidence.pairs import both
from verify.ppl.evidence.scores import Scores
from verify.ppl.record import FreeLevel, frozen_name

# How far beyond what explains it a free-running divergence may lie.
TIMES = 4.0
# Divergences below this are rounding of the logits.
SMALLEST = 1e-12
NOISE_ARMS = 8
TRIMMED = 0.02


class Unexplained(NamedTuple):
    """A free-running divergence that nothing explains; window: where it is largest. In nats a token."""

    free: float
    explained: float
    window: int
    noise_arms: int  # that it was held against

    def __str__(self) -> str:
        noise = f", {self.noise_arms} arms with a rounding of noise" if self.noise_arms else ""
        return (
            f"unsteady: running freely it is {self.free:.2g} nats a token from exact, where floor, baseline"
            f"{noise} and its own errors explain {self.explained:.2g}"
        )


def level_of(kld: np.ndarray) -> FreeLevel:
    """Of divergences [windows, scored] to exact, in nats."""
    scored = kld.shape[1]
    left_out = min(math.ceil(TRIMMED * scored), scored - 1)
    kept = np.sort(kld, 1)[:, : scored - left_out]
    return FreeLevel(mean=float(kld.mean()), trimmed=float(kept.mean()), largest=float(kld.max()))


def beyond(
    free: np.ndarray, frozen: np.ndarray, known: Sequence[FreeLevel], noise: Sequence[FreeLevel]
) -> float | None:
    """What explains a candidate's divergences [windows, scored], running freely and with casts frozen, where
    they are more; None where they are not. known: of floor and baseline."""
    own, at_work = level_of(free), level_of(frozen)

    def explained(name: str) -> float:
        others = max((getattr(level, name) for level in (*known, *noise)), default=0.0)
        return TIMES * (others + TIMES * max(getattr(at_work, name), SMALLEST))

    if own.mean <= explained("mean"):
        return None
    if noise:
        share = float((free > max(level.largest for level in noise)).mean())
        if own.trimmed <= explained("trimmed") and share <= TRIMMED:
            return None
    return explained("mean")


def unexplained(
    scores: Scores, candidate: str, reference: str, floor: str | None, noise: Sequence[FreeLevel] = ()
) -> Unexplained | None:
    """Whether a candidate's free-running divergence is more than what explains it; None where it is not.

    noise: of noise arms, where there are any; else what the floor and the baseline say.
    """
    kld, kld_reference = both(scores, candidate, reference, "kld_to_exact")
    if not kld.size or not np.isfinite(kld).all():
        return None
    frozen = scores.column(frozen_name(candidate), "kld_to_exact")
    of_floor = scores.column(floor, "kld_to_exact") if floor else frozen[:0]
    if not frozen.size or not np.isfinite(frozen).all():
        return None
    known = [level_of(x) for x in (kld_reference, of_floor) if x.size and np.isfinite(x).all()]
    explained = beyond(kld, frozen, known, noise)
    if explained is None:
        return None
    worst = int(scores.windows(candidate)[int(kld.mean(1).argmax())])
    return Unexplained(float(kld.mean()), explained, worst, len(noise))
