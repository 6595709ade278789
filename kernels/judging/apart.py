"""One head that stands apart from the others: a common factor of its results that no other head has.

A gain limit allows for what roundings of one direction can make of a gain, and where sums are float16 that is
more than many a fault. But all heads of a call are computed alike: whatever rounding makes of the gain of one
it makes of all, and what it makes of one alone is chance. Of H heads let g_h be the gains and d_h the
deviations that chance gives them by the arithmetic, up to a factor that all share. Of the others than h

    c = sum w_i g_i / sum w_i,    w_i = 1 / d_i^2,    s^2 = sum w_i (g_i - c)^2 / (H - 2)
    T_h = (g_h - c) / (s sqrt(d_h^2 + 1 / sum w_i))

which is Student's with H - 2 degrees of freedom where gains are normal around one centre (the externally
studentised residual; Cook and Weisberg, Residuals and Influence in Regression, 2.2.1). It needs no budget and
no expected size but for the ratios of the d_h, and of those the smaller half counts as their median: what
heads of one KV head share is no smaller where chance is. The chance that any of H heads goes so far is at
most H times twice the tail, which for nu degrees of freedom and x > 0 is below

    C nu / ((nu - 1) x) (1 + x^2 / nu)^((1 - nu) / 2)
    C = Gamma((nu + 1) / 2) / (Gamma(nu / 2) sqrt(nu pi))

since the density times t / x integrates in closed form. The limit is twice where that is 1e-6: simulated,
normal gains pass it in none of 2,000,000 calls, gains whose deviations are known to a third only in 1 of
25,000 at the most. Several heads that stand apart together make s large and hide one another: another plan
for a group of heads is no fault here. A group of one head may have one too, and is not asked.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

# Chance that heads of a right kernel look so in one call.
CHANCE = 1e-6
# Beyond that by so much, for tails that are heavier than a normal distribution's.
TIMES = 2.0
# Heads that are compared with one another, at the least.
FEWEST_HEADS = 8


class HeadApart(NamedTuple):
    """head: the one farthest from the others; shift: its gain less theirs; limit: of |shift|, by chance;
    centre: the others' gain."""

    head: int
    shift: float
    limit: float
    centre: float


def head_apart(gains: torch.Tensor, deviations: torch.Tensor, chance: float = CHANCE) -> HeadApart | None:
    """gains, deviations [H], NaN for heads of which no gain can be told; None of too few heads.

    chance: of a shift beyond the limit, of any head of a right kernel.
    """
    told = torch.isfinite(gains) & torch.isfinite(deviations) & (deviations > 0)
    heads = told.nonzero().flatten()
    if len(heads) < FEWEST_HEADS:
        return None
    g, d = gains[told].double(), deviations[told].double()
    d = d.clamp(min=float(d.median()))
    w = d.square().reciprocal()
    # Sums over the others of each head.
    others, weighted = w.sum() - w, (w * g).sum() - w * g
    centre = weighted / others
    squares = (w * (g - centre[:, None]).square()).sum(1) - w * (g - centre).square()
    spread = (squares.clamp(min=0) / (len(g) - 2)).sqrt() * (d.square() + 1 / others).sqrt()
    shift = g - centre
    limit = TIMES * _reach(len(g), chance) * spread
    far = int((shift.abs() / limit.clamp(min=1e-300)).argmax())
    return HeadApart(int(heads[far]), float(shift[far]), float(limit[far]), float(centre[far]))


@cache
def _reach(heads: int, chance: float) -> float:
    """What |T| of the farthest of so many heads exceeds with at most that chance."""
    low, high = 1.0, 1e12
    while high / low > 1 + 1e-9:
        x = math.sqrt(low * high)
        low, high = (x, high) if 2 * heads * tail(x, heads - 2) > chance else (low, x)
    return high


def tail(x: float, degrees: int) -> float:
    """No less than the chance that Student's t exceeds x > 0."""
    log_c = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    return math.exp(log_c + (1 - degrees) / 2 * math.log1p(x * x / degrees)) * degrees / (degrees - 1) / x
