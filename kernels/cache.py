"""Quantised caches: the values of ggml's blocks and of fp8, in a layout of our own.

A block is 32 numbers of one head: integer codes and a float16 scale d, for some types a float16 minimum m.

    q8_0    d * c               c = -127 .. 127      d = max|x| / 127
    q6_0    d * (c - 32)        c = 0 .. 63          d = x_max / -32 (ik_llama.cpp)
    q4_0    d * (c - 8)         c = 0 .. 15          d = x_max / -8, x_max the number of largest magnitude
    q4_1    d * c + m           c = 0 .. 15          d = (max x - min x) / 15, m = min x
    q5_0    d * (c - 16)        c = 0 .. 31          d = x_max / -16
    q5_1    d * c + m           c = 0 .. 31          d = (max x - min x) / 31, m = min x
    iq4_nl  d * values[c]       c = 0 .. 15          d least squares, weighted by x^2, for the codes that
                                                     x_max / values[0] gives

Where codes are floating-point numbers, the scale is float32:

    e4m3, e5m2   s * c          c of that type       s by rule: a number (1: nothing is calibrated), or
                                                     max|x| / largest of a sequence (tensor), of a sequence
                                                     and KV head (head), of a token and KV head (token)
    nvfp4        s * d * c      c = 0, .5, 1, 1.5,   d of 16 numbers, in e4m3: max|x| / (6 s); s as above, so
                                2, 3, 4, 6 and minus that the largest d is 448
    fp8_ds_mla   d * c          c e4m3               d of 128 numbers: max|x| / 448; 64 numbers of RoPE that
                                                     are behind them are kept in bfloat16

Conversions to these types round to nearest even and saturate. A sequence's scale is of the keys that its
longest row sees: what lies beyond is no part of the cache.

Quantising to blocks computes in float32 with the unrounded d, as ggml's reference code does, and both
directions are the same to the bit as the `gguf` package's where that has them (it cannot quantise
iq4_nl, and has no q6_0). ggml keeps a block's scale in front of its codes, 34 bytes for q8_0; here the codes
are one plane and the scales another, so that a tile of keys is read in whole cache lines.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from verify.kernels.cache_types import (
    BLOCK,
    CACHE_TYPES,
    KEPT_TYPES,
    MLA_BLOCK,
    MLA_FP8,
    MLA_ROPE,
    NVFP4,
    NVFP4_BLOCK,
    SCALED_TYPES,
    type_multiple,
)
from verify.kernels.numbers import FLOAT_TYPES, FP8_TYPES

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


# The magnitudes of nvfp4's codes, and what lies half-way between two of them.
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_E4M3 = FP8_TYPES["e4m3"]


class Quantised(NamedTuple):
    """Numbers [..., D] as a cache holds them."""

    type: str  # of `KEPT_TYPES`
    # [..., D] int8; float8 of fp8; of fp8_ds_mla the latent part alone; of plain types the numbers themselves
    codes: torch.Tensor
    # [..., D / 32] float16; [..., D / 16] e4m3 of nvfp4; float32 that broadcasts over D, or [..., D / 128]
    scale: torch.Tensor | None = None
    minimum: torch.Tensor | None = None  # [..., D / 32] float16, where the type has one
    factor: torch.Tensor | None = None  # float32 that the scales of nvfp4 are multiplied by; broadcasts
    rope: torch.Tensor | None = None  # [..., 64] bfloat16, of fp8_ds_mla


def quantise(
    x: torch.Tensor, cache_type: str, *, scale: str = "", seen: torch.Tensor | None = None
) -> Quantised:
    """x [..., D] as a cache of this type holds it.

    scale: as in the grammar of `cache_types`; tensor and head want x [B, S, Hkv, D] and seen [B, S], the keys
    of each sequence that some row sees (None: all); of pages a scale is of a page.
    Raises ValueError for an unknown type, or a D that the type does not have.
    """
    if cache_type not in KEPT_TYPES:
        raise ValueError(f"cache: unknown type {cache_type!r}, expected one of {', '.join(KEPT_TYPES)}")
    multiple = type_multiple(cache_type)
    if x.shape[-1] % multiple:
        raise ValueError(
            f"cache: {cache_type} needs head sizes in multiples of {multiple}, got {x.shape[-1]}"
        )
    if cache_type == MLA_FP8:
        return _mla(x)
    if cache_type in SCALED_TYPES:
        return _scaled(x, cache_type, scale, seen)
    if cache_type not in CACHE_TYPES:
        kept = FLOAT_TYPES[cache_type].dtype
        return Quantised(type=cache_type, codes=x if cache_type == "f16" else x.to(kept))
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
    return Quantised(
        type=cache_type,
        codes=codes.to(torch.int8).flatten(-2),
        scale=d.squeeze(-1).to(torch.float16),
        minimum=minimum,
    )


def dequantise(x: Quantised) -> torch.Tensor:
    """The numbers [..., D] that the blocks stand for, in float32."""
    if x.type in FP8_TYPES:
        assert x.scale is not None
        return x.codes.to(torch.float32) * x.scale
    if x.type == NVFP4:
        assert x.scale is not None
        assert x.factor is not None
        table = torch.tensor(FP4_VALUES + tuple(-y for y in FP4_VALUES), device=x.codes.device)
        steps = x.scale.to(torch.float32)[..., None] * x.factor[..., None]
        return (table[x.codes.long()].unflatten(-1, (-1, NVFP4_BLOCK)) * steps).flatten(-2)
    if x.type == MLA_FP8:
        assert x.scale is not None
        latent = x.codes.to(torch.float32).unflatten(-1, (-1, MLA_BLOCK)) * x.scale[..., None]
        parts = [latent.flatten(-2), *([] if x.rope is None else [x.rope.to(torch.float32)])]
        return torch.cat(parts, -1)
    if x.type not in CACHE_TYPES:
        return x.codes.to(torch.float32)
    assert x.scale is not None
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
        if CACHE_TYPES[x.type].codes == 64:
            # Byte j: of numbers j and j + 8 in bits 0 and 4, of j + 16 and j + 24 in bits 2 and 6.
            a, b, c, d = (codes >> 4 & 3).split(8, dim=-1)
            fields.append((a | b << 4 | c << 2 | d << 6).view(torch.uint8))
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


def through_cache(
    x: torch.Tensor, cache_type: str, *, scale: str = "", seen: torch.Tensor | None = None
) -> torch.Tensor:
    """x as it comes back from a cache of this type that is expanded to x's own type; see `quantise`."""
    if cache_type == "f16":
        return x
    return dequantise(quantise(x, cache_type, scale=scale, seen=seen)).to(x.dtype)


def _scaled(x: torch.Tensor, cache_type: str, scale: str, seen: torch.Tensor | None) -> Quantised:
    """fp8 and nvfp4."""
    x = x.to(torch.float32)
    largest = _E4M3.largest * FP4_VALUES[-1] if cache_type == NVFP4 else FP8_TYPES[cache_type].largest
    step = _scale_of(x, scale, seen, largest)
    if cache_type in FP8_TYPES:
        codes = _saturated(x * _inverse(step), cache_type)
        return Quantised(type=cache_type, codes=codes, scale=step)
    blocks = x.unflatten(-1, (-1, NVFP4_BLOCK))
    wanted = blocks.abs().amax(-1) / FP4_VALUES[-1] * _inverse(step)
    own = _saturated(wanted, "e4m3")
    size = (blocks * _inverse(own.to(torch.float32) * step)[..., None]).abs()
    between = torch.tensor(_FP4_BETWEEN, device=x.device)
    # Of two that are equally near the even code.
    at = torch.arange(len(between), device=x.device)
    codes = ((size[..., None] > between) | ((size[..., None] == between) & (at % 2 == 1))).sum(-1)
    codes = codes + len(FP4_VALUES) * (blocks < 0)
    return Quantised(type=NVFP4, codes=codes.to(torch.int8).flatten(-2), scale=own, factor=step)


def _mla(x: torch.Tensor) -> Quantised:
    rope = x.shape[-1] % MLA_BLOCK
    if rope not in (0, MLA_ROPE) or x.shape[-1] < MLA_BLOCK:
        raise ValueError(
            f"cache: {MLA_FP8} needs head sizes of {MLA_BLOCK} times a whole number, and {MLA_ROPE} more"
            f" where RoPE's are behind them, got {x.shape[-1]}"
        )
    latent = x[..., : x.shape[-1] - rope].to(torch.float32).unflatten(-1, (-1, MLA_BLOCK))
    step = latent.abs().amax(-1) / _E4M3.largest
    codes = _saturated(latent * _inverse(step)[..., None], "e4m3").flatten(-2)
    behind = x[..., -rope:].to(torch.bfloat16) if rope else None
    return Quantised(type=MLA_FP8, codes=codes, scale=step, rope=behind)


def _scale_of(x: torch.Tensor, scale: str, seen: torch.Tensor | None, largest: float) -> torch.Tensor:
    """What codes are multiplied by, float32: broadcasts over x."""
    if scale in ("tensor", "head"):
        size = x.abs()
        if seen is not None:
            size = size.masked_fill(~seen[..., None, None], 0.0)
        found = size.amax((1, 2, 3) if scale == "tensor" else (1, 3), keepdim=True)
    elif scale == "token":
        found = x.abs().amax(-1, keepdim=True)
    else:
        return x.new_full((1,) * x.dim(), float(scale or 1), dtype=torch.float32)
    return found / largest


def _saturated(x: torch.Tensor, fp8: str) -> torch.Tensor:
    """x rounded to a type of 8 bits, to its largest number beyond it. NaN stays NaN."""
    kind = FP8_TYPES[fp8]
    return x.clamp(-kind.largest, kind.largest).to(kind.dtype)


def as_numbers(x: torch.Tensor, number: str) -> torch.Tensor:
    """float32 numbers rounded to a type of `NUMBER_TYPES`, in that type."""
    return _saturated(x, number) if number in FP8_TYPES else x.to(FLOAT_TYPES[number].dtype)


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
