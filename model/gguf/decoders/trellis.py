"""ik_llama.cpp's KT types: a number of 13 to 16 bits stands for the next 4 or 8 weights.

From x = number + 4096, x := 0xCBAC1FED * x mod 2^32 again and again; each x gives one value, the sum of its
four bytes' low 6 bits less 126. The values of all 65,536 numbers are a table. Rows begin with their scale,
float32; n blocks of 256 weights.
"""

from __future__ import annotations

from functools import cache

import torch

from verify.kernels.cache import IQ4_NL_VALUES
from verify.model.gguf.decoders.blocks import (
    RowDecoder,
    Scaled,
    fields,
    ints,
    look_up,
    packed,
    pairs,
    planes,
    shorts,
)

MULTIPLIER, FIRST = 0xCBAC1FED, 4096


def iq1_kt(blocks: torch.Tensor, row_scale: torch.Tensor) -> Scaled:
    """d * values[s] * value a group of 32: 8 bytes, low 4 bits s, high 4 the 13th bits of 4 numbers; the low
    8 bits of 32 numbers; 16 bytes, bits 9 to 12 of numbers j and j + 16."""
    high = planes(blocks[:, 40:], 0, 4, mask=15).permute(1, 0, 2).reshape(-1, 32).to(torch.int32) << 8
    top = pairs(blocks[:, :8], 4, 5, 6, 7, mask=1).to(torch.int32) << 12
    codes = look_up(_eight(blocks.device), blocks[:, 8:40].to(torch.int32) | high | top)
    scale = look_up(_scales(blocks.device), blocks[:, :8] & 15)
    return Scaled(codes.view(torch.int8).view(-1, 8, 32), (row_scale * scale)[:, :, None])


def iq2_kt(blocks: torch.Tensor, row_scale: torch.Tensor) -> Scaled:
    """d * values[s] * value a group of 32: 4 bytes, s of groups j and j + 4; 32 numbers of 16 bits."""
    codes = look_up(_eight(blocks.device), shorts(blocks[:, 4:])).view(torch.int8)
    scale = look_up(_scales(blocks.device), _four_bits(blocks[:, :4]))
    return Scaled(codes.view(-1, 8, 32), (row_scale * scale)[:, :, None])


def iq3_kt(blocks: torch.Tensor, row_scale: torch.Tensor) -> Scaled:
    """+- d * s * |value| a group of 32: s and numbers as in IQ2_KT; 32 bytes, bit i of byte j the sign of
    weight j of group i."""
    magnitudes = look_up(_eight_magnitudes(blocks.device), shorts(blocks[:, 4:68])).view(torch.int8)
    signs = 1 - 2 * planes(blocks[:, 68:], *range(8), mask=1).view(torch.int8).permute(1, 0, 2)
    codes = magnitudes.view(-1, 8, 32) * signs.to(torch.float32)  # a negative 0 is one
    return Scaled(codes, (row_scale * _four_bits(blocks[:, :4]))[:, :, None])


def iq4_kt(blocks: torch.Tensor, row_scale: torch.Tensor) -> Scaled:
    """d * (s - 64) * value a group of 32: 8 words, bit 0 the 16th bit of 8 numbers, 7 bits of s, 3 more bits
    of each number; the low 8 bits of 64 numbers; 32 bytes, bits 9 to 12 of numbers j and j + 32."""
    words = ints(blocks[:, :32])
    top = fields(words, *range(8, 32, 3), mask=7) << 12 | ((words & 1) << 15)[:, :, None]
    high = planes(blocks[:, 96:], 0, 4, mask=15).permute(1, 0, 2).reshape(-1, 64).to(torch.int32) << 8
    codes = look_up(_four(blocks.device), blocks[:, 32:96].to(torch.int32) | high | top.view(-1, 64))
    scale = (words >> 1 & 127) - 64
    return Scaled(codes.view(torch.int8).view(-1, 8, 32), (row_scale * scale)[:, :, None])


def _four_bits(stored: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 8] of bytes [n, 4]: their low 4 bits, then their high."""
    return planes(stored, 0, 4, mask=15).permute(1, 0, 2).reshape(-1, 8)


@cache
def _scales(device: torch.device) -> torch.Tensor:
    return torch.tensor(IQ4_NL_VALUES, dtype=torch.int8, device=device)


@cache
def _values() -> torch.Tensor:
    """int8 [65536, 8]: the values that follow each number."""
    x, four_bytes = torch.arange(1 << 16) + FIRST, torch.arange(0, 32, 8)
    values = torch.empty((1 << 16, 8), dtype=torch.int8)
    for k in range(8):
        x = x * MULTIPLIER & 0xFFFFFFFF  # of a product mod 2^64, the low 32 bits are right
        values[:, k] = (x[:, None] >> four_bytes & 0x3F).sum(1) - 126
    return values


@cache
def _eight(device: torch.device) -> torch.Tensor:
    return packed(_values()).to(device)


@cache
def _eight_magnitudes(device: torch.device) -> torch.Tensor:
    return packed(_values().abs()).to(device)


@cache
def _four(device: torch.device) -> torch.Tensor:
    return packed(_values()[:, :4]).to(device)


ROW_DECODERS: dict[str, RowDecoder] = {
    "IQ1_KT": iq1_kt,
    "IQ2_KT": iq2_kt,
    "IQ3_KT": iq3_kt,
    "IQ4_KT": iq4_kt,
}
