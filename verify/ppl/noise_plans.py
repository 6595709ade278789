"""Noise arms: the baseline's kernel with another plan, drawn at random.

A correct kernel may cut its work up in many ways, and each gives other bits. What an ensemble of them does to
the perplexity and to the distance is what a change of plan does by itself: a candidate that lies among them
has changed nothing else. Plans are drawn without replacement from head groups that sum to r, part sizes up to
half the context, and tiles of 32, 64 and 128 keys; the arithmetic (types of P, accumulators, result, cache)
is the baseline's own.
"""

from __future__ import annotations

import zlib

import numpy as np

from verify.kernels.errors import SpecError
from verify.kernels.plans.plan import powers_of_two
from verify.kernels.plans.spec import PLAN_OPTIONS, parse_spec

# Keys a tile; the smallest for short contexts only, where larger ones leave nothing to cut.
BLOCKS, SHORT_BLOCK, SHORT = (32, 64, 128), 16, 256
MOST_PARTS = 16
# Kernels whose plan can be asked for.
PLANNED = ("flash", "eager")


def noise_specs(baseline: str, count: int, *, ratio: int, n_ctx: int, seed: int) -> list[str]:
    """Specifications of `count` noise arms, none of them twice, the same for the same arguments.

    Raises SpecError where the baseline's plan cannot be asked for, or n_ctx has fewer plans.
    """
    spec = parse_spec(baseline)
    if spec.name not in PLANNED:
        raise SpecError(
            f"--noise: needs a baseline whose plan can be moved ({' or '.join(PLANNED)}), got {baseline!r}"
        )
    # Head groups alone change no bit, so it is cuts and tiles that must differ.
    cuts = []
    for block in (SHORT_BLOCK, *BLOCKS) if n_ctx < SHORT else BLOCKS:
        tiles = -(-n_ctx // block)
        cuts += [(block, block * n) for n in range(max(tiles // MOST_PARTS, 1), tiles // 2 + 1)]
    if count > len(cuts):
        raise SpecError(
            f"--noise {count}: windows of {n_ctx} tokens have {len(cuts)} plans, expected no more than that"
        )
    rng = np.random.default_rng(zlib.crc32(f"noise/{seed}".encode()))
    # Everything but its plan is its arithmetic.
    kept = [f"{key}={value}" for key, value in spec.options.items() if key not in PLAN_OPTIONS]
    found = []
    for index in rng.permutation(len(cuts))[:count]:
        block, size = cuts[index]
        groups = "+".join(map(str, _random_groups(ratio, rng)))
        plan = [f"heads={groups}", f"kv=size:{size}", f"block={block}"]
        found.append(f"{spec.name}:{','.join(plan + kept)}")
    return found


def _random_groups(ratio: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Head groups that sum to r: all heads, one by one, or powers of two in a random order."""
    kind = rng.integers(3)
    if kind == 0:
        return (ratio,)
    if kind == 1 and ratio <= 16:
        return (1,) * ratio
    return tuple(int(g) for g in rng.permutation(powers_of_two(ratio)))
