"""Blocks of 32 weights with one scale, and a minimum where the type has one. d, m: float16; q: whole numbers.

A byte of q holds weight j in its low half and weight j + 16 in its high half.
"""

from __future__ import annotations

import torch

from verify.model.gguf.decoders.blocks import Decoder, Scaled, halves, planes, spread


def q4_0(blocks: torch.Tensor) -> Scaled:
    """d * (q - 8): d, 32 q of 4 bits."""
    return Scaled(_nibbles(blocks[:, 2:]).sub_(8).view(torch.int8), halves(blocks[:, :2])[:, None])


def q4_1(blocks: torch.Tensor) -> Scaled:
    """d * q + m: d, m, 32 q of 4 bits."""
    scale, minimum = halves(blocks[:, :4])[:, None].split(1, dim=-1)
    return Scaled(_nibbles(blocks[:, 4:]), scale, minimum)


def q5_0(blocks: torch.Tensor) -> Scaled:
    """d * (q - 16): d, the fifth bits of 32 q, their low 4."""
    codes = _nibbles(blocks[:, 6:]).bitwise_or_(spread(blocks[:, 2:6], 16).view(-1, 2, 16))
    return Scaled(codes.sub_(16).view(torch.int8), halves(blocks[:, :2])[:, None])


def q5_1(blocks: torch.Tensor) -> Scaled:
    """d * q + m: d, m, the fifth bits of 32 q, their low 4."""
    codes = _nibbles(blocks[:, 8:]).bitwise_or_(spread(blocks[:, 4:8], 16).view(-1, 2, 16))
    scale, minimum = halves(blocks[:, :4])[:, None].split(1, dim=-1)
    return Scaled(codes, scale, minimum)


def q6_0(blocks: torch.Tensor) -> Scaled:
    """d * (q - 32): d, the high 2 bits of 32 q (those of j, j + 8, j + 16 and j + 24 in byte j: of the first
    two in bits 0, 4, then 2, 6), their low 4. ik_llama.cpp's."""
    high = planes(blocks[:, 2:10], 0, 4, 2, 6, mask=3, left=4).view(2, 2, -1, 8).permute(2, 0, 1, 3)
    codes = _nibbles(blocks[:, 10:]).unflatten(-1, (2, 8)).bitwise_or_(high)
    return Scaled(codes.sub_(32).view(torch.int8), halves(blocks[:, :2])[:, None, None])


def q8_0(blocks: torch.Tensor) -> Scaled:
    """d * q: d, 32 q int8."""
    return Scaled(blocks[:, 2:].view(torch.int8), halves(blocks[:, :2]))


def _nibbles(stored: torch.Tensor) -> torch.Tensor:
    """uint8 [blocks, 2, 16] of [blocks, 16] bytes: low halves first, then high."""
    return planes(stored, 0, 4, mask=15).permute(1, 0, 2)


DECODERS: dict[str, Decoder] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q6_0": q6_0,
    "Q8_0": q8_0,
}
