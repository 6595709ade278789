"""ik_llama.cpp's K and KS types: 256 weights a block, each one of a few values times its group's scale.

Every type has two sets of values, the second a constant above the first; a bit of each group chooses. Where
a row begins with its scale, `row_scale` [blocks, 1] float32 is it, else d is a float16 of the block. Groups
are of 16 or 32 weights; n blocks.
"""

from __future__ import annotations

from functools import cache

import torch

from verify.kernels.cache import IQ4_NL_VALUES
from verify.model.gguf.decoders.blocks import (
    Decoder,
    RowDecoder,
    Scaled,
    halves,
    look_up,
    pairs,
    planes,
    shorts,
    spread,
    valued,
)
from verify.model.gguf.decoders.k_quants import four_bits, one_bit, two_bits

VALUES_2 = (-31, -13, 1, 17)
VALUES_3 = (-63, -40, -23, -10, 1, 13, 28, 47)
VALUES_4 = IQ4_NL_VALUES
VALUES_5 = (
    -126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6, -1, 5, 11, 17, 23, 29,
    36, 43, 51, 59, 68, 77, 87, 97, 109, 121,
)  # fmt: skip
# How far the second set is above the first.
STEP_2, STEP_3, STEP_4, STEP_5, STEP_6 = 5, 4, 4, 2, 1
# IQ2_KL: two weights a code, each one of seven values.
PAIRS_2 = (
    (-63, -23), (-63, 13), (-40, -63), (-40, -10), (-40, 13), (-40, 47), (-23, -40), (-23, -23), (-23, 1),
    (-23, 13), (-23, 28), (-10, -63), (-10, 1), (-10, 13), (-10, 47), (1, -23), (1, -10), (1, 1), (1, 13),
    (1, 28), (13, -40), (13, -23), (13, -10), (13, 1), (13, 13), (28, -63), (28, -23), (28, 1), (28, 28),
    (28, 47), (47, -23), (47, 13),
)  # fmt: skip


def iq2_k(blocks: torch.Tensor) -> Scaled:
    """d * (s - 8) * value a group of 16: d, 16 bits of choice, 16 s of 4 bits, 256 q in the order of Q2_K."""
    codes = valued(two_bits(blocks[:, 12:]).contiguous(), VALUES_2).view(-1, 16, 16)
    scale = pairs(blocks[:, 4:12], 0, 4, mask=15).sub_(8).view(torch.int8)
    return _scaled(codes, halves(blocks[:, :2]) * scale, spread(blocks[:, 2:4], STEP_2))


def iq3_k(blocks: torch.Tensor) -> Scaled:
    """+- d * (2 s + 1) * value a group of 16: d, choice, 16 signs, 16 s of 4 bits, low 2 bits of q, third."""
    codes = two_bits(blocks[:, 14:78]).bitwise_or_(one_bit(blocks[:, 78:], left=2))
    codes = valued(codes.contiguous(), VALUES_3).view(-1, 16, 16)
    odd = pairs(blocks[:, 6:14], 0, 4, mask=15) * 2 + 1
    scale = odd.view(torch.int8) * (1 - spread(blocks[:, 4:6], 2).view(torch.int8))
    return _scaled(codes, halves(blocks[:, :2]) * scale, spread(blocks[:, 2:4], STEP_3))


def iq4_k(blocks: torch.Tensor) -> Scaled:
    """d * (s - 32) * value a group of 16: d, choice, 16 s of 6 bits, 256 q, a byte for j and j + 16 of 32."""
    codes = valued(planes(blocks[:, 16:], 0, 4, mask=15), VALUES_4).view(2, -1, 8, 16).permute(1, 2, 0, 3)
    return _scaled(codes, halves(blocks[:, :2]) * _six_bits(blocks[:, 4:16]), spread(blocks[:, 2:4], STEP_4))


def iq5_k(blocks: torch.Tensor) -> Scaled:
    """d * (s - 32) * value a group of 16: d, choice, 16 s of 6 bits, low 4 bits of q as in Q4_K, fifth."""
    codes = _five_bits(blocks[:, 16:144], blocks[:, 144:]).view(-1, 16, 16)
    return _scaled(codes, halves(blocks[:, :2]) * _six_bits(blocks[:, 4:16]), spread(blocks[:, 2:4], STEP_5))


def iq6_k(blocks: torch.Tensor) -> Scaled:
    """d * s * value a group of 16: d, choice, 16 s int8, low 4 bits of q as in Q4_K, high 2 as in Q2_K.

    Values are the cubic of the engine's CPU decoder. Its CUDA decoder rounds them to whole numbers.
    """
    high = two_bits(blocks[:, 148:], left=4).unflatten(2, (2, 2))
    q = four_bits(blocks[:, 20:148]).unflatten(1, (2, 2)).bitwise_or_(high)
    codes = valued(q.contiguous(), _cubic(), torch.float32).view(-1, 16, 16)
    scale = halves(blocks[:, :2]) * blocks[:, 4:20].view(torch.int8)
    return _scaled(codes, scale, spread(blocks[:, 2:4], STEP_6))


def iq2_ks(blocks: torch.Tensor, row_scale: torch.Tensor) -> Scaled:
    """d * (s - 16) * value a group of 32: 8 bits of choice, the fifth bits of 8 s, low 4, q as in Q2_K."""
    codes = valued(two_bits(blocks[:, 6:]).contiguous(), VALUES_2).view(-1, 8, 32)
    scale = (pairs(blocks[:, 2:6], 0, 4, mask=15) | spread(blocks[:, 1:2], 16)).sub_(16).view(torch.int8)
    return _scaled(codes, row_scale * scale, spread(blocks[:, :1], STEP_2))


def iq3_ks(blocks: torch.Tensor, row_scale: torch.Tensor) -> Scaled:
    """d * (s - 16) * value a group of 32: the fifth bits of 8 s, choice, low 4 (of s 0-3, then 4-7), q."""
    codes = two_bits(blocks[:, 6:70]).bitwise_or_(one_bit(blocks[:, 70:], left=2))
    codes = valued(codes.contiguous(), VALUES_3).view(-1, 8, 32)
    low = planes(blocks[:, 2:6], 0, 4, mask=15).permute(1, 0, 2).reshape(-1, 8)
    scale = low.bitwise_or_(spread(blocks[:, :1], 16)).sub_(16).view(torch.int8)
    return _scaled(codes, row_scale * scale, spread(blocks[:, 1:2], STEP_3))


def iq4_ks(blocks: torch.Tensor, row_scale: torch.Tensor) -> Scaled:
    """d * (2 s - 127) * value a group of 32: 8 bytes of choice and 7 bits of s, q as in IQ4_K."""
    codes = valued(planes(blocks[:, 8:], 0, 4, mask=15), VALUES_4).view(2, -1, 8, 16).permute(1, 2, 0, 3)
    scale, chosen = _seven_bits(blocks[:, :8])
    return _scaled(codes, row_scale * scale, chosen * STEP_4)


def iq5_ks(blocks: torch.Tensor, row_scale: torch.Tensor) -> Scaled:
    """d * (2 s - 127) * value a group of 32: 8 bytes of choice and 7 bits of s, q as in IQ5_K."""
    codes = _five_bits(blocks[:, 8:136], blocks[:, 136:]).view(-1, 8, 32)
    scale, chosen = _seven_bits(blocks[:, :8])
    return _scaled(codes, row_scale * scale, chosen * STEP_5)


def iq4_kss(blocks: torch.Tensor, row_scale: torch.Tensor) -> Scaled:
    """As IQ4_KS, in 8 words of 16 bits a group: a bit of the choice and s in each word's lowest bit, and the
    word less it, exclusive-or of itself and its half, is four q."""
    words = shorts(blocks)
    high = words & 0xFFFE
    q = (high ^ high >> 1).to(torch.int16).view(torch.uint8).view(-1, 128)
    codes = valued(planes(q, 0, 4, mask=15), VALUES_4).view(2, -1, 8, 16).permute(1, 2, 0, 3)
    places = torch.arange(8, dtype=torch.int32, device=blocks.device)
    byte = ((words & 1).view(-1, 8, 8) << places).sum(-1).to(torch.uint8)
    scale, chosen = _seven_bits(byte)
    return _scaled(codes, row_scale * scale, chosen * STEP_4)


def iq2_kl(blocks: torch.Tensor, row_scale: torch.Tensor) -> Scaled:
    """d * (s - 32) * value a group of 32, two weights a code of 5 bits: high 2 bits of 8 s, low 4 (of s 0-3,
    then 4-7), low 4 bits of codes (j of one group, then of the next), fifth."""
    low = planes(blocks[:, 6:70], 0, 4, mask=15).view(2, -1, 4, 16).permute(1, 2, 0, 3)
    fifth = planes(blocks[:, 70:], *range(8), mask=1, left=4).view(4, 2, -1, 16).permute(2, 0, 1, 3)
    codes = look_up(_pairs_2(blocks.device), low.bitwise_or_(fifth)).view(torch.int8).view(-1, 8, 32)
    low_scale = planes(blocks[:, 2:6], 0, 4, mask=15).permute(1, 0, 2).reshape(-1, 8)
    high_scale = pairs(blocks[:, :2], 0, 2, 4, 6, mask=3) << 4
    scale = low_scale.bitwise_or_(high_scale).sub_(32).view(torch.int8)
    return Scaled(codes, (row_scale * scale)[:, :, None])


def _scaled(codes: torch.Tensor, scale: torch.Tensor, step: torch.Tensor) -> Scaled:
    """Codes in groups [n, groups, ...] raised by the groups' steps [n, groups], with their scales."""
    shape = (*scale.shape, *[1] * (codes.dim() - 2))
    if codes.dim() == 4 and scale.shape[1] == 16:  # [n, 8, 2, 16]
        shape = (-1, 8, 2, 1)
    return Scaled(codes.add_(step.view(torch.int8).view(shape)), scale.view(shape))


def _five_bits(low: torch.Tensor, fifth: torch.Tensor) -> torch.Tensor:
    """Values of q: low 4 bits [n, 128] as in Q4_K, the fifth [n, 32] a bit for each group of 32."""
    codes = four_bits(low).bitwise_or_(one_bit(fifth, left=4).view(-1, 4, 2, 32))
    return valued(codes.contiguous(), VALUES_5)


def _six_bits(stored: torch.Tensor) -> torch.Tensor:
    """int8 [n, 16], s - 32: the high 2 bits of 16 s in 4 bytes, their low 4 in 8."""
    high = pairs(stored[:, :4], 0, 2, 4, 6, mask=3) << 4
    return (pairs(stored[:, 4:], 0, 4, mask=15) | high).sub_(32).view(torch.int8)


def _seven_bits(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 2 s - 127 and the choice, of bytes whose lowest bit is the choice."""
    return (stored & 254).sub_(127).view(torch.int8), stored & 1


@cache
def _pairs_2(device: torch.device) -> torch.Tensor:
    return torch.tensor(PAIRS_2, dtype=torch.int8).view(torch.int16).view(-1).to(device)


@cache
def _cubic() -> tuple[float, ...]:
    """a + q (b + q (c + q d)) for q = 0 to 63 by fused multiply-adds in float32, as the engine is compiled:
    each is exact in float64, then rounded."""
    a, b, c, d = torch.tensor([-127.0, 6.2568, -0.11218, 0.0011972]).double()
    q = torch.arange(64).double()
    return tuple((a + q * (b + q * (c + q * d).float().double()).float().double()).float().tolist())


DECODERS: dict[str, Decoder] = {
    "IQ2_K": iq2_k,
    "IQ3_K": iq3_k,
    "IQ4_K": iq4_k,
    "IQ5_K": iq5_k,
    "IQ6_K": iq6_k,
}
ROW_DECODERS: dict[str, RowDecoder] = {
    "IQ2_KS": iq2_ks,
    "IQ2_KL": iq2_kl,
    "IQ3_KS": iq3_ks,
    "IQ4_KS": iq4_ks,
    "IQ4_KSS": iq4_kss,
    "IQ5_KS": iq5_ks,
}
