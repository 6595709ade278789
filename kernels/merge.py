"""The merge algebra: combining partial results of softmax attention.

A part is attention over some of the keys: its normalised output o_i and the natural logarithm of its softmax
denominator, lse_i = ln sum_j exp(s_j) over its own keys. Over all parts,

    M = max_i lse_i     w_i = exp(lse_i - M)     o = sum_i w_i o_i / sum_i w_i     lse = M + ln sum_i w_i

which is the attention over the union of their keys, because w_i is the part's share of the whole softmax
denominator. The identity is the empty part (o = 0, lse = -inf). Sums run over parts in the order given, so
the same parts in the same order give the same bits. Rounding: each output passes one exponential, one
product, at most P additions and one division (design depth d_m = P + 3).

The base of lse is e everywhere in this project. A kernel whose lse is in base 2 is converted by `from_base2`
where it enters: weights computed in the wrong base are right for parts of equal lse and wrong for all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch


class Part(NamedTuple):
    """out [..., D] and lse [...] in natural logarithm; the same leading shape."""

    out: torch.Tensor
    lse: torch.Tensor


# Combines parts in the order given.
Merge = Callable[[Sequence[Part]], Part]


def empty_part(like: Part) -> Part:
    """The identity of `merge`: out = 0, lse = -inf, in the shape and dtype of `like`."""
    return Part(torch.zeros_like(like.out), torch.full_like(like.lse, -math.inf))


def from_base2(lse: torch.Tensor) -> torch.Tensor:
    """lse in natural logarithm from one in base 2: log2(x) * ln 2 = ln(x)."""
    return lse * math.log(2.0)


def merge(a: Part, b: Part) -> Part:
    """Attention over the keys of both parts."""
    return merge_sequential((a, b))


def merge_sequential(parts: Sequence[Part]) -> Part:
    """All parts at once, summed in the order given.

    parts: at least one; out [..., D] and lse [...] of equal shapes. Raises ValueError on none.
    """
    if not parts:
        raise ValueError("parts: expected at least one part")
    top = parts[0].lse
    for part in parts[1:]:
        top = torch.maximum(top, part.lse)
    # All parts empty: exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
    shift = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    total = torch.zeros_like(top)
    out = torch.zeros_like(parts[0].out)
    for part in parts:
        weight = torch.exp(part.lse - shift)
        total = total + weight
        out = out + weight[..., None] * part.out
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    lse = torch.where(empty, torch.full_like(top, -math.inf), shift + torch.log(safe))
    return Part(out / safe[..., None], lse)


def merge_tree(parts: Sequence[Part]) -> Part:
    """Pairwise, neighbours first, as a parallel reduction does; an odd part is carried up unchanged."""
    if not parts:
        raise ValueError("parts: expected at least one part")
    level = list(parts)
    while len(level) > 1:
        paired = [merge(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = paired + ([level[-1]] if len(level) % 2 else [])
    return level[0]
