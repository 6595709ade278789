"""Where the KV range is cut, read off a kernel.

A large number at key i and its negative at key j, both of the largest logit, all other values 0. Where both
lie in one part its sum is exactly 0, in every type and order of summation. Parts are normalised apart and
merged by weights that are rounded, so that across a cut a residue is left,

    w_a (M / l_a) - w_b (M / l_b),    w_a = exp(L_a - L), rounded,

unless both parts have the same l: all other keys have logits drawn anew for each query head. Merges of sums
that are not normalised leave none; `weights` looks for those by the rounding of P.
"""

from __future__ import annotations

import itertools

import torch

from verify.kernels.identify.asking import LARGE, Asking

# The largest logit. L is about as large, and rounding it to float32 makes a residue of 2^-19, which does not
# vanish by chance; around 0 it would be 2^-24 and did so in one case of three.
TOP = 64.0


def cuts_seen(ask: Asking, generator: torch.Generator) -> tuple[int, ...]:
    """Bounds 0 < ... < n_kv of the parts of the last row."""
    n, width = ask.regime.n_kv, ask.regime.columns
    cuts = []
    edges = [round(i * (n - 1) / width) for i in range(width + 1)] if n > width else list(range(n))
    pending = [(a, b) for a, b in itertools.pairwise(edges) if a < b]
    while pending:
        apart: list[tuple[int, int]] = []
        for first in range(0, len(pending), width):
            some = pending[first : first + width]
            apart += [
                pair for pair, is_apart in zip(some, _apart(ask, some, generator), strict=True) if is_apart
            ]
        cuts += [b for a, b in apart if b == a + 1]
        wide = [(a, b) for a, b in apart if b > a + 1]
        pieces = max(width // max(len(wide), 1), 2)
        pending = []
        for a, b in wide:
            count = min(pieces, b - a)
            inner = [a + (b - a) * i // count for i in range(count + 1)]
            pending += list(itertools.pairwise(inner))
    return (0, *sorted(cuts), n)


def _apart(ask: Asking, pairs: list[tuple[int, int]], generator: torch.Generator) -> list[bool]:
    """Whether the keys of each pair lie in different parts."""
    r = ask.regime
    # Multiples of 1/4, exact in every 16-bit type; light beside the pairs.
    low = TOP - torch.randint(8 * 4, 12 * 4, (r.ratio, r.n_kv), generator=generator).double() / 4
    keys = sorted({key for pair in pairs for key in pair})
    low[:, keys] = TOP
    values = ask.columns([{a: LARGE, b: -LARGE} for a, b in pairs])
    found = ask.weigh(low, values)
    return (found != 0).any(0).tolist()
