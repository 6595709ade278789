"""Blocks of bytes taken apart: what every decoder is made of.

A decoder gives whole numbers and what they are multiplied with, `Scaled`. Whole numbers of a few bits are
taken out of their bytes eight bytes at a time, as int64, and stay bytes until the one multiplication that
makes weights of them: little memory is moved.

An arithmetic right shift is as good as a logical one here: a mask follows, which keeps the bits that came
from the same byte.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch


class Scaled(NamedTuple):
    """Weights codes * scale + offset, two roundings where there is an offset.

    codes: [blocks, ...] of any type, in the order of the weights; scale, offset: float32 that broadcasts to
    it.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | None = None

    def write(self, out: torch.Tensor) -> None:
        """Fill out [blocks, weights of a block] float32."""
        weights = out.view(self.codes.shape)
        torch.mul(self.codes, self.scale, out=weights)
        if self.offset is not None:
            # A step of its own: a fused multiply-add would round once, and give other bits.
            weights.add_(self.offset)


# [blocks, bytes of a block] uint8, and for types with a header a row its scale [blocks, 1] float32.
Decoder = Callable[[torch.Tensor], Scaled]
RowDecoder = Callable[[torch.Tensor, torch.Tensor], Scaled]


def halves(stored: torch.Tensor) -> torch.Tensor:
    """float32 [n, k] of float16 numbers [n, 2k] uint8."""
    return _owned(stored).view(torch.float16).to(torch.float32)


def shorts(stored: torch.Tensor) -> torch.Tensor:
    """int32 [n, k], 0 to 65535, of 16-bit numbers [n, 2k] uint8."""
    return _owned(stored).view(torch.int16).to(torch.int32) & 0xFFFF


def ints(stored: torch.Tensor) -> torch.Tensor:
    """int32 [n, k] of 32-bit numbers [n, 4k] uint8; numbers from 2^31 on are negative."""
    return _owned(stored).view(torch.int32)


def planes(stored: torch.Tensor, *shifts: int, mask: int, left: int = 0) -> torch.Tensor:
    """((byte >> shift) & mask) << left for each shift: [n, k] uint8 to [shifts, n, k] uint8."""
    words = _words(stored)
    if words.device.type == "cuda":  # one launch for all
        taken = words >> _column(shifts, words.dtype, words.device)
    else:  # the vector units want one amount for all
        taken = torch.stack([words >> shift for shift in shifts])
    taken.bitwise_and_(_repeated(mask, words.dtype))
    if left:
        taken.bitwise_left_shift_(left)
    return taken.view(torch.uint8).view(len(shifts), *stored.shape)


def fields(words: torch.Tensor, *shifts: int, mask: int) -> torch.Tensor:
    """(word >> shift) & mask for each shift: [...] of whole numbers to [..., shifts]."""
    return (words.unsqueeze(-1) >> _row(shifts, words.dtype, words.device)).bitwise_and_(mask)


def pairs(stored: torch.Tensor, *shifts: int, mask: int) -> torch.Tensor:
    """(byte >> shift) & mask, a byte's fields after each other: [n, k] uint8 to [n, k * shifts] uint8."""
    return planes(stored, *shifts, mask=mask).permute(1, 2, 0).flatten(1)


def spread(stored: torch.Tensor, one: int = 1) -> torch.Tensor:
    """Every bit a byte, `one` where it is set: [n, k] uint8 to [n, 8k] uint8, lowest bit first."""
    return look_up(_spread_bits(one, stored.device), stored).view(torch.uint8)


def look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """table[index] of a table of one dimension; the index is of any whole type."""
    return table.index_select(0, index.reshape(-1).to(torch.int32)).view(index.shape)


def valued(codes: torch.Tensor, values: tuple[float, ...], dtype: torch.dtype = torch.int8) -> torch.Tensor:
    """values[code] for codes [..., 2k] uint8, contiguous: a table of all pairs is asked once for two."""
    return look_up(_value_pairs(values, dtype, codes.device), codes.view(torch.int16)).view(dtype)


def signed(magnitudes: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """int8 [..., 8k] of magnitudes [..., k] int64, eight bytes of 1 to 127 each, negated where the byte of
    `negative` is 255 and not 0."""
    # -x is ~x + 1 in every byte, and no byte overflows into the next: ~x is at most 254.
    flipped = magnitudes ^ negative
    return flipped.add_(negative & _repeated(1, torch.int64)).view(torch.int8)


def packed(rows: torch.Tensor) -> torch.Tensor:
    """A table of rows as one of words: int8 [n, 8] to int64 [n], int8 [n, 4] to int32 [n]."""
    dtype = {8: torch.int64, 4: torch.int32}[rows.shape[1]]
    return rows.to(torch.int8).contiguous().view(dtype).view(-1)


@cache
def sign_bytes(device: torch.device) -> torch.Tensor:
    """int64 [256]: eight bytes of a byte's bits, 255 where the bit is set."""
    return _spread_bits(255, device)


@cache
def even_sign_bytes(device: torch.device) -> torch.Tensor:
    """int64 [128]: the same for seven bits and an eighth that makes the number of set bits even."""
    seven = torch.arange(128)
    odd = sum((seven >> bit) & 1 for bit in range(7)) & 1
    return sign_bytes(device)[(seven | odd << 7).to(device)]


def _owned(stored: torch.Tensor) -> torch.Tensor:
    """A copy, contiguous: a part of a single block is contiguous as it is, at any address."""
    return stored.clone(memory_format=torch.contiguous_format)


def _words(stored: torch.Tensor) -> torch.Tensor:
    """The bytes [n, k] as the widest whole numbers that end where rows end, [n * k / width]."""
    dtype = next(
        kind for kind in (torch.int64, torch.int32, torch.int16) if not stored.shape[-1] % kind.itemsize
    )
    return _owned(stored).view(-1).view(dtype)


def _repeated(byte: int, dtype: torch.dtype) -> int:
    """The byte in every byte of a word of a type; below 128."""
    return byte * (((1 << 8 * dtype.itemsize) - 1) // 255)


@cache
def _column(shifts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(shifts, dtype=dtype, device=device)[:, None]


@cache
def _row(shifts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(shifts, dtype=dtype, device=device)


@cache
def _spread_bits(one: int, device: torch.device) -> torch.Tensor:
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return packed((bits * one).to(torch.uint8).view(torch.int8)).to(device)


@cache
def _value_pairs(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[256 * codes] of two values each, by a code and 256 times the one after it."""
    both = torch.arange(256 * len(values))
    of_code = torch.zeros(256, dtype=dtype)
    of_code[: len(values)] = torch.tensor(values, dtype=dtype)
    two = torch.stack([of_code[both & 255], of_code[both >> 8]], dim=1)
    return two.view({1: torch.int16, 4: torch.int64}[dtype.itemsize]).view(-1).to(device)
