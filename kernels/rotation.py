"""The Walsh-Hadamard rotation of heads, in blocks: H H = 1, so that scores of rotated q and k are unchanged.

H of n = 2^L has the elements (-1)^popcount(i & j) / sqrt(n): Sylvester's matrix, orthonormal and symmetric.
It is applied in L steps of additions and one multiplication. Engines rotate Q, and K before it is stored, V
before it is stored, and the result once more; outliers of one channel are then spread over a block's numbers.
"""

from __future__ import annotations

import math

import torch


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """x [..., D] rotated in blocks along its last dimension, in x's own type; block 0: x itself.

    Twice gives x again, up to rounding. Raises ValueError where blocks do not divide D, or are no power of 2.
    """
    if not block:
        return x
    if block & (block - 1) or x.shape[-1] % block:
        raise ValueError(
            f"rotate: expected a power of two that divides the head size {x.shape[-1]}, got {block}"
        )
    y = x.unflatten(-1, (-1, block))
    half = 1
    while half < block:
        pairs = y.unflatten(-1, (-1, 2, half))
        a, b = pairs.unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return (y * (1 / math.sqrt(block))).flatten(-2)


def roundings(block: int) -> int:
    """Roundings that a number passes in one rotation, the factor's own included."""
    return block.bit_length() + 1 if block else 0


def block_mean_square(x: torch.Tensor, block: int) -> torch.Tensor:
    """For each number the root mean square of its block: what independent errors become."""
    if not block:
        return x
    blocks = x.unflatten(-1, (-1, block))
    return blocks.square().mean(-1, keepdim=True).sqrt().expand_as(blocks).flatten(-2)


def spread_bound(x: torch.Tensor, block: int) -> torch.Tensor:
    """|H| x: what bounds x >= 0 become where signs are not known."""
    if not block:
        return x
    blocks = x.unflatten(-1, (-1, block))
    return (blocks.sum(-1, keepdim=True) / math.sqrt(block)).expand_as(blocks).flatten(-2)
