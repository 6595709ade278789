"""Where the KV range is cut, read off a kernel.

A large number at key i and its negative at key j, both of the largest logit, all other values 0. Where both
lie in one part its sum is exactly 0, in every type and order of summation. Parts are normalised apart and
merged by weights that are rounded, so that across a cut a residue is left,

    w_a (M / l_a) - w_b (M / l_b),    w_a = exp(L_a - L), rounded,

unless both parts have the same l: all other keys have logits drawn anew for each query head. Merges of sums
that are not normalised leave none; `weights` looks for those by the rounding of P.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from verify.kernels.identify.asking import Asking, columns

# The largest logit. L is about as large, and rounding it to float32 makes a residue of 2^-19, which does not
# vanish by chance; around 0 it would be 2^-24 and did so in one case of three.
TOP = 64.0
# A power of two: its product with any P is exact. Where a sum fuses multiplication and addition, as a matrix
# product in float32 does, M P is rounded and - M P is not, so that any other M leaves a residue in one part.
_M = 2.0**15
# What float32 leaves of a pair whose L is as large: a few roundings of 2^-19.
_NOT_16_BITS = 2.0**-14


class Cuts(NamedTuple):
    """bounds: 0 < ... < n_kv of the parts of the last row; residue: the largest that was left of a pair,
    relative to its terms; 0 of one part."""

    bounds: tuple[int, ...]
    residue: float

    @property
    def stored_in(self) -> str | None:
        """The type of partial results between their sums and the merge: residues are about one rounding."""
        if self.residue < _NOT_16_BITS:
            return "f32"
        return "f16" if self.residue < 2.0**-9.5 else "bf16" if self.residue < 2.0**-6 else None


def cuts_seen(ask: Asking, generator: torch.Generator) -> Cuts:
    """Where the last row is cut."""
    n, width = ask.regime.n_kv, ask.regime.columns
    cuts = []
    residue = 0.0
    # Few of the keys: the others make the parts' l differ.
    count = max(min(width, n // 4), 1)
    edges = [round(i * (n - 1) / count) for i in range(count + 1)]
    pending = [(a, b) for a, b in pairwise(edges) if a < b]
    while pending:
        apart: list[tuple[int, int]] = []
        for first in range(0, len(pending), width):
            some = pending[first : first + width]
            left = _residues(ask, some, generator)
            residue = max([residue, *left])
            apart += [pair for pair, size in zip(some, left, strict=True) if size > 0]
        cuts += [b for a, b in apart if b == a + 1]
        wide = [(a, b) for a, b in apart if b > a + 1]
        pieces = max(width // max(len(wide), 1), 2)
        pending = []
        for a, b in wide:
            count = min(pieces, b - a)
            inner = [a + (b - a) * i // count for i in range(count + 1)]
            pending += list(pairwise(inner))
    return Cuts((0, *sorted(cuts), n), residue)


def _residues(ask: Asking, pairs: list[tuple[int, int]], generator: torch.Generator) -> list[float]:
    """What is left of each pair, relative: 0 where its keys lie in one part."""
    r = ask.regime
    # Multiples of 1/4, exact in every 16-bit type; light beside the pairs.
    low = TOP - torch.randint(8 * 4, 12 * 4, (r.ratio, r.n_kv), generator=generator).double() / 4
    keys = sorted({key for pair in pairs for key in pair})
    low[:, keys] = TOP
    values = columns([{a: _M, b: -_M} for a, b in pairs])
    l = torch.exp(low - TOP).sum(1, keepdim=True)
    found: list[float] = (ask.weigh(low, values) * l / _M).abs().nan_to_num(1.0, posinf=1.0).amax(0).tolist()
    return found
