"""Free-running passes reach the verdict: a kernel that errs on calls that nobody measured.

Calls of an arm that runs freely are judged nowhere by themselves, and one bad call in 34 leaves no trace in
the frozen distance. So the free-running divergence F of a candidate is held against what explains it,

    F_c > 4 (max(F_floor, F_baseline) + 4 K_c)         K_c: its divergence with casts frozen

and where it is more, its calls on the worst window are asked again, several times each. A call that is not
steady is a bug, with its place; without one the run is `inconclusive`, and never ends with 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from verify.ppl.evidence.pairs import both
from verify.ppl.evidence.scores import Scores
from verify.ppl.record import frozen_name

# How far beyond what explains it a free-running divergence may lie.
TIMES = 4.0
# Divergences below this are rounding of the logits.
SMALLEST = 1e-12


class Unexplained(NamedTuple):
    """A free-running divergence that nothing explains; window: where it is largest. In nats a token."""

    free: float
    explained: float
    window: int

    def __str__(self) -> str:
        return (
            f"unsteady: running freely it is {self.free:.2g} nats a token from exact, where floor, baseline"
            f" and its own errors explain {self.explained:.2g}"
        )


def unexplained(scores: Scores, candidate: str, reference: str, floor: str | None) -> Unexplained | None:
    """Whether a candidate's free-running divergence is more than what explains it; None where it is not."""
    kld, kld_reference = both(scores, candidate, reference, "kld_to_exact")
    if not kld.size or not np.isfinite(kld).all():
        return None
    frozen = scores.column(frozen_name(candidate), "kld_to_exact")
    of_floor = scores.column(floor, "kld_to_exact") if floor else frozen[:0]
    if not frozen.size or not np.isfinite(frozen).all():
        return None
    known = [float(x.mean()) for x in (kld_reference, of_floor) if x.size and np.isfinite(x).all()]
    explained = TIMES * (max(known, default=0.0) + TIMES * max(float(frozen.mean()), SMALLEST))
    free = float(kld.mean())
    if free <= explained:
        return None
    worst = int(scores.windows(candidate)[int(kld.mean(1).argmax())])
    return Unexplained(free, explained, worst)
