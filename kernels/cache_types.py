"""The types of a quantised cache, by ggml's names: how many codes a block's numbers have, and what they take.

How numbers become codes and back is in `verify.kernels.cache`.
"""

from __future__ import annotations

from typing import NamedTuple

from verify.kernels.numbers import FLOAT_TYPES

# Numbers of one head that share a scale.
BLOCK = 32


class CacheType(NamedTuple):
    """codes: number of codes; zero: the code of 0 (types without a minimum); minimum: whether m is kept."""

    codes: int
    zero: int
    minimum: bool = False


CACHE_TYPES: dict[str, CacheType] = {
    "q8_0": CacheType(255, 0),
    "q4_0": CacheType(16, 8),
    "q4_1": CacheType(16, 0, minimum=True),
    "q5_0": CacheType(32, 16),
    "q5_1": CacheType(32, 0, minimum=True),
    "iq4_nl": CacheType(16, 0),
}
# Types that keep numbers as they are given.
PLAIN_BITS = {name: float(kind.bits) for name, kind in FLOAT_TYPES.items()}


def bits_per_number(cache_type: str) -> float:
    """Memory of one number, scale and minimum included: 8.5 for q8_0, 4.5 for q4_0."""
    if cache_type in PLAIN_BITS:
        return PLAIN_BITS[cache_type]
    kind = CACHE_TYPES[cache_type]
    return float((kind.codes - 1).bit_length()) + 16 * (1 + kind.minimum) / BLOCK
