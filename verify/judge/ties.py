"""Whether a changed token is a tie: the two tokens so near each other that rounding alone decides.

One rounding of noise on exact attention moves the logits. Its divergence at a token is half the variance of
that movement, weighted by probability, and the difference of two logits has twice the variance of one: the
difference of two likely tokens moves by sqrt(4 KLD), root mean square.
"""

from __future__ import annotations

import math

# Beyond this many times its root mean square, rounding alone hardly ever reaches (3 sigma: 0.3 %).
FAR = 3.0


def moved_by_rounding(floor_kld: float) -> float:
    """Nats by which one rounding of noise moves two likely tokens apart, where it diverges by so many nats
    from exact; NaN: not measured there."""
    return floor_kld if math.isnan(floor_kld) else math.sqrt(4 * max(floor_kld, 0.0))


def is_tie(moved: float, floor: float) -> bool | None:
    """Whether rounding alone explains that a candidate moves two tokens by so many nats, where it moves them
    by `floor` (rms). None where that is not known; what is not finite is no tie.

    >>> is_tie(3e-4, 2e-4), is_tie(3e-3, 2e-4), is_tie(3e-4, float("nan"))
    (True, False, None)
    """
    return None if math.isnan(floor) else moved <= FAR * floor
