"""What so many windows will be able to tell: said before a run starts, and corrected after its first
group."""

from __future__ import annotations

import math

from verify.judge.statistics import TYPICAL_DEVIATION, deviation_of, expected_half_width
from verify.machine.terminal import counted
from verify.ppl.evidence.pairs import distance_between
from verify.ppl.evidence.scores import Scores
from verify.ppl.record import frozen_name


def foresight(windows: int, scored: int, deviation: float = TYPICAL_DEVIATION) -> str:
    """windows: that are measured; scored: tokens of each; deviation: of one token's theta."""
    width = expected_half_width(windows, windows * scored, deviation)
    what = f"{counted(windows, 'measured window')} of {scored} scored tokens"
    if math.isinf(width):
        return f"{what}: too few for an interval, expect `inconclusive` (--chunks, --ctx-size)"
    return f"{what} will tell a distance ratio to within about {width:.0%} (99.9 %)"


def deviation_so_far(scores: Scores, candidate: str, reference: str) -> float | None:
    """Standard deviation of one token's theta in a group, None where it cannot be told."""
    names = frozen_name(candidate), frozen_name(reference)
    distance = distance_between(*names, None, scores)
    if distance is None or not 0 < distance.theta_se < math.inf:
        return None
    kld = scores.column(names[0], "kld_to_exact")
    return deviation_of(distance, len(kld), kld.size)
