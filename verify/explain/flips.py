"""Whether rounding explains that a greedy text has another token than exact attention prefers.

At a position exact attention prefers token x; a text has y there. The margin m = l_x - l_y >= 0 is what some
arithmetic must have overcome. How far right arithmetics move it *on this very prefix* is measured: K passes
that round otherwise (noise, other KV parts, float16 sums, P in bfloat16) move it by d_1 .. d_K, and

    sigma^2 = (sum d_k^2 + nu s^2) / (K + nu)        s^2: the median of the same over the text's positions

K draws at one position are few, so s counts as nu = 4 more. A right arithmetic moves the margin by t sigma, t
of Student's distribution with K + nu degrees of freedom:

    p      = 2 P(t > m / sigma)                     how rare a move as large as this is
    p_flip = 2 F (1 - F), F = P(t < m / sigma)      probability that two right arithmetics disagree here

Over a whole text the flips that rounding makes are rare and independent: the number of those with a p of at
most L is Poisson's, with the mean sum P(t > max(m / sigma, t_L)) over positions and over the most likely
tokens after the first, t_L the quantile of p = L. Two flips of p = 1e-4 in one text are no chance, though
each may be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import special, stats

from verify.explain.reference import EXACT, Pass, ReferencePasses

Answer = Literal["tie", "not explained", "inconclusive"]
DRAWS = (
    Pass("noise 1", "floor", seed=7919),
    Pass("noise 2", "floor", seed=15838),
    Pass("plan 1", spec="flash:kv=4"),
    Pass("plan 2", spec="flash:heads=split,kv=2"),
    Pass("f16 sums 1", spec="flash:acc=f16"),
    Pass("f16 sums 2", spec="flash:acc=f16,kv=3"),
    Pass("bf16 P 1", spec="flash:p=bf16"),
    Pass("bf16 P 2", spec="flash:p=bf16,kv=2"),
)
PRIOR = 4
# A move this rare, or rarer, is not rounding's; one up to the other is. Between them nothing is said.
TOO_RARE, COMMON = 1e-6, 1e-3
# Flips are counted by how rare they are: all, and those with p up to each of these.
LEVELS = (1.0, 1e-2, 1e-3, 1e-4)
SEEN_WITH = 0.95
# Tokens after the most likely one that may overtake it.
RIVALS = 3
_LARGEST_FAULT = 20.0
_LEAST = 1e-300


class Position(NamedTuple):
    """A token that is not exact attention's first choice."""

    # Of the token in its text, from 0.
    at: int
    n_kv: int  # keys that it sees
    chosen: int  # id of the token that stands there
    preferred: int  # id of exact attention's first choice
    margin: float  # of exact's logits between these two
    sigma: float  # what rounding moves it by, one standard deviation
    # See the module's text.
    p: float
    p_flip: float  # probability that two right arithmetics disagree here


class Walked(NamedTuple):
    """A text walked beside exact attention. Arrays [n], one a token that was looked at."""

    first: int
    # Of exact attention's most likely token over the next ones [n, RIVALS], and how far rounding moves each.
    margins: np.ndarray
    sigmas: np.ndarray
    degrees: int
    flips: list[Position]

    @property
    def expected(self) -> float:
        """Flips that rounding makes in the whole text."""
        return float(likely(self.margins / self.sigmas, self.degrees).sum())

    def together(self, sought: int | None = None) -> float:
        """See `together`; sought: where the texts part."""
        return together(
            self.margins / self.sigmas,
            self.degrees,
            {f.at - self.first: f.p for f in self.flips},
            None if sought is None else sought - self.first,
        )


class Window(NamedTuple):
    """Every position of some tokens, whatever came there: what rounding does to exact attention's choice."""

    # Exact attention's most likely tokens [n, 1 + RIVALS] and their logits, float64.
    tokens: torch.Tensor
    logits: torch.Tensor
    whole: torch.Tensor
    sigmas: np.ndarray
    degrees: int

    @property
    def ratios(self) -> np.ndarray:
        """Margins over what rounding moves them by [n, RIVALS]."""
        return np.asarray(_margins(self.logits).cpu().numpy() / self.sigmas)

    @property
    def expected(self) -> float:
        """As Walked.expected."""
        return float(likely(self.ratios, self.degrees).sum())

    def moves_of(self, logits: torch.Tensor) -> np.ndarray:
        """[n]: how far another pass moves the margin of the two most likely tokens, in sigmas."""
        found = _margins(logits.gather(1, self.tokens).double()) - _margins(self.logits)
        return np.asarray(found[:, 0].cpu().numpy() / self.sigmas[:, 0])

    def flips_of(self, logits: torch.Tensor) -> np.ndarray:
        """Positions [flips], from 0, at which another pass prefers another token."""
        return np.asarray((logits.argmax(-1) != self.tokens[:, 0]).nonzero()[:, 0].cpu().numpy())

    def p_of(self, logits: torch.Tensor) -> np.ndarray:
        """p (see the module's text) at each of `flips_of`."""
        chosen = logits.argmax(-1)
        flipped = (chosen != self.tokens[:, 0]).nonzero()[:, 0]
        margin = self.logits[flipped, 0] - self.whole[flipped, chosen[flipped]].double()
        sigma = self.sigmas[flipped.cpu().numpy()]
        # Of a rival that is none of the listed: the largest of theirs.
        place = (self.tokens[flipped, 1:] == chosen[flipped, None]).cpu().numpy()
        own = np.where(place.any(1), (sigma * place).sum(1), sigma.max(1, initial=0.0))
        return np.asarray(2 * stats.t.sf(margin.cpu().numpy() / own, self.degrees))


def walk_window(
    reference: ReferencePasses, tokens: Sequence[int], *, draws: Sequence[Pass] = DRAWS
) -> Window:
    """Rounding at every position of `tokens`, each after all tokens before it."""
    whole = reference.logits(tokens, EXACT, len(tokens))
    columns = whole.topk(1 + RIVALS).indices
    logits = whole.gather(1, columns).double()
    sigma = _sigmas(reference, tokens, len(tokens), columns, logits, draws)
    return Window(columns, logits, whole, sigma, len(draws) + PRIOR)


def walk(
    reference: ReferencePasses,
    before: Sequence[int],
    text: Sequence[int],
    *,
    first: int = 0,
    draws: Sequence[Pass] = DRAWS,
) -> Walked:
    """Look at the tokens text[first:], each after all before it. `before`: the prompt, at least one token."""
    tokens = [*before, *text][:-1]
    scored = len(text) - first
    logits = reference.logits(tokens, EXACT, scored)
    top = logits.topk(1 + RIVALS)
    chosen = torch.tensor(list(text[first:]), device=logits.device)
    # Columns: the most likely tokens, and the one that the text has.
    columns = torch.cat((top.indices, chosen[:, None]), 1)
    exact = logits.gather(1, columns).double()
    del logits
    sigma = _sigmas(reference, tokens, scored, columns, exact, draws)
    margins = _margins(exact).cpu().numpy()
    degrees = len(draws) + PRIOR
    preferred = top.indices[:, 0].tolist()
    flips = []
    for i, token in enumerate(text[first:]):
        if token == preferred[i]:
            continue
        ratio = float(margins[i, -1] / sigma[i, -1])
        below = float(special.stdtr(degrees, ratio))
        flips.append(
            Position(
                at=first + i,
                n_kv=len(before) + first + i,
                chosen=token,
                preferred=preferred[i],
                margin=float(margins[i, -1]),
                sigma=float(sigma[i, -1]),
                p=2 * float(stats.t.sf(ratio, degrees)),
                p_flip=2 * below * (1 - below),
            )
        )
    return Walked(first, margins[:, :RIVALS], sigma[:, :RIVALS], degrees, flips)


def _sigmas(
    reference: ReferencePasses,
    tokens: Sequence[int],
    scored: int,
    columns: torch.Tensor,
    exact: torch.Tensor,
    draws: Sequence[Pass],
) -> np.ndarray:
    """[n, columns - 1]: how far rounding moves the margin of the first column over each other one."""
    moves = []
    for draw in draws:
        found = reference.logits(tokens, draw, scored).gather(1, columns).double()
        moves.append(_margins(found) - _margins(exact))
    squares = torch.stack(moves).square().cpu().numpy()  # [K, n, columns - 1]
    typical = float(np.median(squares.mean(0)[:, 0]))
    sigma = np.sqrt((squares.sum(0) + PRIOR * typical) / (len(draws) + PRIOR))
    return np.asarray(np.maximum(sigma, np.finfo(np.float32).eps))


def _margins(columns: torch.Tensor) -> torch.Tensor:
    """[n, RIVALS + 1]: the most likely token over the next ones, and over the text's own."""
    return columns[:, :1] - columns[:, 1:]


def likely(ratios: np.ndarray, degrees: int, level: float = 1.0) -> np.ndarray:
    """Probability of a flip by rounding at each position [n], of those alone whose p is at most `level`.

    ratios: margins over what rounding moves them by [n, rivals]. From above where rivals are close.
    """
    beyond = np.maximum(ratios, stats.t.isf(level / 2, degrees))
    return np.asarray(np.minimum(stats.t.sf(beyond, degrees).sum(1), 1.0))


def together(ratios: np.ndarray, degrees: int, flips: Mapping[int, float], sought: int | None) -> float:
    """Probability that rounding alone makes flips so many and so rare.

    ratios [n, rivals]: see `likely`; flips: p of each by its position; sought: the position that was chosen
    because it is a flip. That one counts by how rare it is *among flips*, all others by how many there are as
    rare as LEVELS (Poisson; the least of these tails, times their number). Fisher's method joins the two.
    """
    p_sought = 1.0
    if sought is not None and sought in flips:
        among = likely(ratios, degrees, flips[sought]).sum() / likely(ratios, degrees).sum()
        p_sought = min(float(among), 1.0)
    p_others = 1.0
    for level in LEVELS:
        count = sum(p <= level for at, p in flips.items() if at != sought)
        if count:
            at_each = likely(ratios, degrees, level)
            mean = float(at_each.sum() - (0.0 if sought is None else at_each[sought]))
            p_others = min(p_others, len(LEVELS) * float(stats.poisson.sf(count - 1, mean)))
    joined = max(p_sought * p_others, _LEAST)
    return joined if sought not in flips else joined * (1 - math.log(joined))


def answer_of(rarest: float, joined: float, flips: int) -> Answer:
    """What a text's flips come to.

    rarest: the least p of its flips; joined: see `together`; flips: how many p's `rarest` is the least of.
    """
    if rarest < TOO_RARE or joined < TOO_RARE:
        return "not explained"
    # Of many flips one is rare by chance.
    return "inconclusive" if rarest < COMMON / max(flips, 1) or joined < COMMON else "tie"


def worst(walked: Walked) -> Position | None:
    """The flip that rounding explains least."""
    return min(walked.flips, key=lambda f: f.p, default=None)


def detectable(walked: Walked) -> float:
    """The least fault that would have been seen: root mean square of what it moves margins by, in nats.

    Seen: with probability SEEN_WITH some margin is overcome that rounding overcomes too rarely. inf if none
    is.
    """
    most = float(stats.t.isf(TOO_RARE / 2, walked.degrees))
    margins, sigmas = walked.margins[:, 0], walked.sigmas[:, 0]
    needed = margins[margins > most * sigmas]

    def missed(size: float) -> float:
        return float(np.log1p(-stats.norm.sf(needed / size)).sum())

    low, high = 1e-6, _LARGEST_FAULT
    if missed(high) > math.log(1 - SEEN_WITH):
        return math.inf
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if missed(middle) < math.log(1 - SEEN_WITH) else (middle, high)
    return high
