"""K-quants: blocks of 256 weights in groups of 16 or 32, whose scales are whole numbers times the block's d.

Shapes in comments: n blocks. Weights come in halves of 128 where a byte holds 4 or 8 of them, 32 apart.
"""

from __future__ import annotations

import torch

from verify.model.gguf.decoders.blocks import Decoder, Scaled, halves, ints, planes


def q2_k(blocks: torch.Tensor) -> Scaled:
    """d * s * q - dmin * m a group of 16: 16 bytes of s (low 4 bits) and m, 256 q of 2 bits, d, dmin."""
    whole = planes(blocks[:, :16], 0, 4, mask=15)  # [2, n, 16]: s, m
    return Scaled(two_bits(blocks[:, 16:80]).unflatten(-1, (2, 16)), *_affine(whole, blocks[:, 80:]))


def q3_k(blocks: torch.Tensor) -> Scaled:
    """d * (s - 32) * (q - 4) a group of 16: the third bits of q, their low 2, 16 s of 6 bits, d."""
    codes = two_bits(blocks[:, 32:96]).add_(one_bit(blocks[:, :32], left=2)).sub_(4)
    # Of s, the low 4 bits of 0-7 and 8-15 in 8 bytes, the high 2 of 0-3, 4-7, 8-11, 12-15 in 4.
    low = planes(blocks[:, 96:104], 0, 4, mask=15).permute(1, 0, 2).reshape(-1, 16)
    high = planes(blocks[:, 104:108], 0, 2, 4, 6, mask=3, left=4).permute(1, 0, 2).reshape(-1, 16)
    scale = halves(blocks[:, 108:]) * low.bitwise_or_(high).sub_(32).view(torch.int8)
    return Scaled(codes.view(torch.int8).unflatten(-1, (2, 16)), scale.view(-1, 2, 4, 2, 1))


def q4_k(blocks: torch.Tensor) -> Scaled:
    """d * s * q - dmin * m a group of 32: d, dmin, 8 s and 8 m of 6 bits, 256 q of 4 bits."""
    return Scaled(four_bits(blocks[:, 16:]), *_affine(_six_bits(blocks[:, 4:16]), blocks[:, :4]))


def q5_k(blocks: torch.Tensor) -> Scaled:
    """As Q4_K, with the fifth bits of q before their low 4."""
    high = one_bit(blocks[:, 16:48], left=4).view(-1, 4, 2, 32)
    codes = four_bits(blocks[:, 48:]).bitwise_or_(high)
    return Scaled(codes, *_affine(_six_bits(blocks[:, 4:16]), blocks[:, :4]))


def q6_k(blocks: torch.Tensor) -> Scaled:
    """d * s * (q - 32) a group of 16: the low 4 bits of q, their high 2, 16 s int8, d."""
    # A byte of the low bits holds weights j and j + 64 of a half.
    low = planes(blocks[:, :128], 0, 4, mask=15).view(2, -1, 2, 64).permute(1, 2, 0, 3)
    codes = low.unflatten(-1, (2, 32)).bitwise_or_(two_bits(blocks[:, 128:192], left=4).unflatten(2, (2, 2)))
    scale = halves(blocks[:, 208:]) * blocks[:, 192:208].view(torch.int8)
    return Scaled(codes.sub_(32).view(torch.int8).unflatten(-1, (2, 16)), scale.view(-1, 2, 2, 2, 2, 1))


def two_bits(stored: torch.Tensor, left: int = 0) -> torch.Tensor:
    """uint8 [n, 2, 4, 32] of [n, 64] bytes: a half's weights j, j + 32, j + 64, j + 96 in its byte j."""
    return planes(stored, 0, 2, 4, 6, mask=3, left=left).view(4, -1, 2, 32).permute(1, 2, 0, 3)


def one_bit(stored: torch.Tensor, left: int = 0) -> torch.Tensor:
    """uint8 [n, 2, 4, 32] of [n, 32] bytes: bit i of byte j belongs to weight j of group i of 32."""
    bits = planes(stored, *range(8), mask=1, left=left)
    return bits.view(2, 4, -1, 32).permute(2, 0, 1, 3)


def four_bits(stored: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 4, 2, 32] of [n, 128] bytes: weights j and j + 32 of a quarter in its byte j."""
    return planes(stored, 0, 4, mask=15).view(2, -1, 4, 32).permute(1, 2, 0, 3)


def _six_bits(stored: torch.Tensor) -> torch.Tensor:
    """uint8 [2, n, 8], s and m of 12 bytes: the first 4 of each in the low 6 bits of bytes 0-3 and 4-7, the
    last 4 in the halves of bytes 8-11, their high 2 bits above the first 4."""
    words = ints(stored)  # [n, 3], a byte for each of four
    first, last = words[:, :2], words[:, 2:]
    six = torch.empty((2, words.shape[0], 2), dtype=torch.int32, device=stored.device)
    torch.bitwise_and(first, 0x3F3F3F3F, out=six[:, :, 0].T)
    low = torch.cat([last, last >> 4], dim=1).bitwise_and_(0x0F0F0F0F)
    torch.bitwise_or(low, (first >> 2).bitwise_and_(0x30303030), out=six[:, :, 1].T)
    return six.view(torch.uint8)


def _affine(whole: torch.Tensor, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales d * s and offsets -dmin * m, of whole numbers s, m [2, n, groups] and d, dmin [n, 4] uint8."""
    both = halves(stored).T[:, :, None] * whole
    shape = (-1, 2, 4, 2, 1) if whole.shape[2] == 16 else (-1, 4, 2, 1)
    return both[0].view(shape), both[1].neg_().view(shape)


DECODERS: dict[str, Decoder] = {"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
