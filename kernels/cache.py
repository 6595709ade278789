"""Quantised caches: the values of ggml's blocks, in a layout of our own.

A block is 32 numbers of one head: integer codes and a float16 scale d, for some types a float16 minimum m.

    q8_0    d * c               c = -127 .. 127      d = max|x| / 127
    q4_0    d * (c - 8)         c = 0 .. 15          d = x_max / -8, x_max the number of largest magnitude
    q4_1    d * c + m           c = 0 .. 15          d = (max x - min x) / 15, m = min x
    q5_0    d * (c - 16)        c = 0 .. 31          d = x_max / -16
    q5_1    d * c + m           c = 0 .. 31          d = (max x - min x) / 31, m = min x
    iq4_nl  d * values[c]       c = 0 .. 15          d least squares, weighted by x^2, for the codes that
                                                     x_max / values[0] gives

Quantising computes in float32 with the unrounded d, as ggml's reference code does, and both directions are
the same to the bit as the `gguf` package's where that has them (it cannot quantise iq4_nl). ggml keeps a
block's scale in front of its codes, 34 bytes for q8_0; here the codes are one plane and the scales another,
so that a tile of keys is read in whole cache lines.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from verify.kernels.cache_types import BLOCK, CACHE_TYPES

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Quantised(NamedTuple):
    """codes [..., D] int8; scale and minimum [..., D / 32] float16, minimum where the type has one."""

    type: str
    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None = None


def quantise(x: torch.Tensor, cache_type: str) -> Quantised:
    """x [..., D] in blocks of 32 along its last dimension.

    Raises ValueError for an unknown type, or a D that is not a multiple of 32.
    """
    if cache_type not in CACHE_TYPES:
        raise ValueError(f"cache: unknown type {cache_type!r}, expected one of {', '.join(CACHE_TYPES)}")
    if x.shape[-1] % BLOCK:
        raise ValueError(f"cache: {cache_type} needs head sizes in multiples of {BLOCK}, got {x.shape[-1]}")
    kind = CACHE_TYPES[cache_type]
    blocks = x.to(torch.float32).unflatten(-1, (-1, BLOCK))
    minimum = None
    if cache_type == "iq4_nl":
        codes, d = _nonlinear(blocks)
    elif kind.minimum:
        low = blocks.amin(-1, keepdim=True)
        d = (blocks.amax(-1, keepdim=True) - low) / (kind.codes - 1)
        codes = torch.trunc((blocks - low) * _inverse(d) + 0.5).clamp(0, kind.codes - 1)
        minimum = low.squeeze(-1).to(torch.float16)
    elif cache_type == "q8_0":
        d = blocks.abs().amax(-1, keepdim=True) / 127
        scaled = blocks * _inverse(d)
        # Halves are rounded away from zero.
        size = scaled.abs()
        whole = torch.floor(size)
        codes = torch.sign(scaled) * (whole + torch.floor(2 * (size - whole)))
    else:
        d = _of_largest_magnitude(blocks) / -kind.zero
        codes = torch.trunc(blocks * _inverse(d) + (kind.zero + 0.5)).clamp(0, kind.codes - 1)
    return Quantised(cache_type, codes.to(torch.int8).flatten(-2), d.squeeze(-1).to(torch.float16), minimum)


def dequantise(x: Quantised) -> torch.Tensor:
    """The numbers [..., D] that the blocks stand for, in float32."""
    codes = x.codes.unflatten(-1, (-1, BLOCK))
    if x.type == "iq4_nl":
        table = torch.tensor(IQ4_NL_VALUES, dtype=torch.float32, device=codes.device)
        numbers = table[codes.long()]
    else:
        numbers = codes.to(torch.float32) - CACHE_TYPES[x.type].zero
    numbers = numbers * x.scale.to(torch.float32)[..., None]
    if x.minimum is not None:
        numbers = numbers + x.minimum.to(torch.float32)[..., None]
    return numbers.flatten(-2)


def ggml_blocks(x: Quantised) -> torch.Tensor:
    """The bytes [..., D / 32 * block] in which ggml keeps these numbers: scale, minimum, high bits, codes.

    Two codes of 4 bits share a byte, number i of a block with number i + 16; the fifth bits of q5 types are
    32 bits of their own.
    """
    codes = x.codes.unflatten(-1, (-1, BLOCK))
    fields = [
        scale[..., None].contiguous().view(torch.uint8) for scale in (x.scale, x.minimum) if scale is not None
    ]
    if x.type == "q8_0":
        fields.append(codes.view(torch.uint8))
    else:
        if CACHE_TYPES[x.type].codes == 32:
            bits = (codes >> 4 & 1).unflatten(-1, (4, 8)) << torch.arange(8, device=codes.device)
            fields.append(bits.sum(-1).to(torch.uint8))
        low = codes & 15
        fields.append((low[..., :16] | low[..., 16:] << 4).view(torch.uint8))
    return torch.cat(fields, dim=-1).flatten(-2)


def q8_0_error(x: torch.Tensor) -> torch.Tensor:
    """What each number of x [..., D] may lose when it is quantised to q8_0, in float64.

    Half a step of amax / 127, a little more where a product takes the place of the division, and 127 times
    what the step loses when it is rounded to float16.
    """
    largest = x.double().unflatten(-1, (-1, BLOCK)).abs().amax(-1, keepdim=True)
    lost = largest / 254 * (1 + 2.0**-10) + largest * 2.0**-11 + 127 * 2.0**-25
    return lost.expand(*lost.shape[:-1], BLOCK).flatten(-2)


def through_cache(x: torch.Tensor, cache_type: str) -> torch.Tensor:
    """x as it comes back from a cache of this type that is expanded to x's own type."""
    return dequantise(quantise(x, cache_type)).to(x.dtype)


def _inverse(d: torch.Tensor) -> torch.Tensor:
    """1 / d, and 0 for an empty block."""
    return torch.where(d == 0, 0.0, 1 / torch.where(d == 0, 1.0, d))


def _of_largest_magnitude(blocks: torch.Tensor) -> torch.Tensor:
    """The number of each block whose magnitude is largest, with its sign; of several the first."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


def _nonlinear(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of iq4_nl. Sums run over a block in order, as compiled C does."""
    values = torch.tensor(IQ4_NL_VALUES, dtype=torch.float32, device=blocks.device)
    scaled = blocks * _inverse(_of_largest_magnitude(blocks) / values[0])
    above = torch.searchsorted(values, scaled.contiguous(), right=True).clamp(1, len(IQ4_NL_VALUES) - 1)
    nearer_below = scaled - values[above - 1] < values[above] - scaled
    codes = torch.where(nearer_below, above - 1, above)
    chosen = values[codes]
    weighted = blocks * blocks * chosen
    product = torch.zeros_like(blocks[..., 0])
    square = torch.zeros_like(product)
    for j in range(BLOCK):
        product = product + weighted[..., j] * blocks[..., j]
        square = square + weighted[..., j] * chosen[..., j]
    d = torch.where(square == 0, 0.0, product / torch.where(square == 0, 1.0, square))
    return codes, d[..., None]
