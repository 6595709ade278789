"""Four-bit floating-point and ternary types. n blocks."""

from __future__ import annotations

from functools import cache

import torch

from verify.model.gguf.decoders.blocks import Decoder, Scaled, halves, look_up, packed, planes, valued
from verify.model.gguf.decoders.k_quants import two_bits

# Twice the numbers of E2M1: a sign, two bits of exponent, one of mantissa. -0 is 0 here, as in the engines.
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def mxfp4(blocks: torch.Tensor) -> Scaled:
    """2^(e - 128) * doubled E2M1: e of 8 bits, 32 q of 4 bits as in Q4_0. OCP Microscaling, v1.0."""
    codes = valued(planes(blocks[:, 1:], 0, 4, mask=15), E2M1_DOUBLED)
    return Scaled(codes.permute(1, 0, 2), look_up(_half_e8m0(blocks.device), blocks[:, :1])[:, None])


def nvfp4(blocks: torch.Tensor) -> Scaled:
    """s / 2 * doubled E2M1 a group of 16: 4 s in unsigned E4M3, 64 q, each group in the order of Q4_0."""
    codes = valued(planes(blocks[:, 4:], 0, 4, mask=15), E2M1_DOUBLED).view(2, -1, 4, 8)
    scale = look_up(_half_e4m3(blocks.device), blocks[:, :4])
    return Scaled(codes.permute(1, 2, 0, 3), scale[:, :, None, None])


def tq1_0(blocks: torch.Tensor) -> Scaled:
    """d * (q - 1): 256 q of 3 values, five (in the last 4 bytes four) a byte, d.

    The digits of a byte are those of the fraction byte / 256 in base 3. A run of 32, 16, 4 bytes holds the
    first digits of all its bytes, then the second, and so on.
    """
    digits = look_up(_trits(blocks.device), blocks[:, :52]).view(torch.int8).view(-1, 52, 8).transpose(1, 2)
    runs = (digits[:, :5, :32], digits[:, :5, 32:48], digits[:, :4, 48:])
    return Scaled(torch.cat([run.flatten(1) for run in runs], dim=1), halves(blocks[:, 52:]))


def tq2_0(blocks: torch.Tensor) -> Scaled:
    """d * (q - 1): 256 q of 2 bits in the order of Q2_K, d."""
    codes = two_bits(blocks[:, :64]).sub_(1).view(torch.int8)
    return Scaled(codes, halves(blocks[:, 64:])[:, None, None])


@cache
def _half_e8m0(device: torch.device) -> torch.Tensor:
    """float32 [256]: 2^(e - 128)."""
    return torch.ldexp(torch.ones(256), torch.arange(-128, 128)).to(device)


@cache
def _half_e4m3(device: torch.device) -> torch.Tensor:
    """float32 [256]: half of an unsigned E4M3 number; the top bit is ignored, 0x7f (NaN) is 0."""
    bits = torch.arange(256)
    exponent, mantissa = bits >> 3 & 15, (bits & 7) / 8
    normal = torch.ldexp(1 + mantissa, exponent - 8)
    values = torch.where(exponent == 0, torch.ldexp(mantissa, torch.tensor(-7)), normal)
    values[0x7F] = 0
    return values.to(device)


@cache
def _trits(device: torch.device) -> torch.Tensor:
    """int64 [256]: five digits of base 3, each less 1, of a byte; the bytes above are 0."""
    byte, rows = torch.arange(256), torch.zeros((256, 8), dtype=torch.int8)
    for place in range(5):
        rows[:, place] = (byte * 3**place % 256 * 3 >> 8) - 1
    return packed(rows).to(device)


DECODERS: dict[str, Decoder] = {"MXFP4": mxfp4, "NVFP4": nvfp4, "TQ1_0": tq1_0, "TQ2_0": tq2_0}
