"""Slices cut and multiplied in Triton: `int8_products` with one pass over each operand and result.

Importing this module imports Triton, and Triton decides then whether functions are compiled or interpreted
(TRITON_INTERPRET=1). Its results have the bits of the products by `torch._int_mm`: digits are the same, sums
of whole numbers exact, and the float64 additions in one order.
"""

# Triton's functions are not typed.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """What one program multiplies; no bit depends on it."""

    rows: int
    columns: int
    terms: int  # at once; operands are padded to it
    warps: int
    stages: int


# The fastest of eight on an H200, of 128 terms and of 8,192 (benchmarks/results/h200-sliced-oracle.json).
# The third is for rows and columns so few, as those of P V often are, that some processors would have no
# program of the second. Of the 99 KB of shared memory that smaller cards give a program none takes more
# than 64.
FEW_TERMS = 256  # heads seldom have more numbers; one of 64 would be half padding in the other tiles
OF_FEW_TERMS = Tile(rows=64, columns=128, terms=64, warps=4, stages=3)
OF_MANY_TERMS = Tile(rows=128, columns=128, terms=128, warps=8, stages=3)
OF_FEW_PROGRAMS = Tile(rows=64, columns=64, terms=128, warps=4, stages=4)
# Rows and terms that one program cuts.
_CUT_ROWS, _CUT_TERMS = 16, 64


@triton.jit
def _cut(
    x, factors, digits, rows, terms, padded, of_head, of_row, of_term,
    HALVES: tl.constexpr, SLICES: tl.constexpr, LARGEST_FIRST: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """digits [heads, rows, SLICES, padded] of x times a factor a row, rounded to whole numbers."""
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    term = tl.program_id(1).to(tl.int64) * T + tl.arange(0, T)
    there = (row < rows)[:, None] & (term < terms)[None, :]
    at = x + head * of_head + row[:, None] * of_row + term[None, :] * of_term
    factor = tl.load(factors + head * rows + row, mask=row < rows, other=0.0)
    scaled = tl.load(at, mask=there, other=0.0) * factor[:, None]
    size = tl.abs(scaled)
    # To nearest, ties to even: beside 2^52 there are no fractions; what is larger has none.
    size = tl.where(size < 4503599627370496.0, (size + 4503599627370496.0) - 4503599627370496.0, size)
    whole = size.to(tl.int64)
    shifted = tl.where(scaled < 0, -whole, whole) + HALVES
    to = digits + ((head * rows + row) * SLICES * padded)[:, None] + term[None, :]
    kept = (row < rows)[:, None] & (term < padded)[None, :]
    for i in tl.static_range(SLICES):
        place = SLICES - 1 - i if LARGEST_FIRST else i
        digit = ((shifted >> (8 * i)) & 255) - 128
        tl.store(to + place * padded, digit.to(tl.int8), mask=kept)


@triton.jit
def _multiply(
    left, right, left_powers, right_powers, out, m, n, padded,
    SLICES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out [heads, m, n]: digits of left, smallest first, with those of right, largest first."""
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    term = tl.arange(0, K)
    width = SLICES * padded
    a = left + ((head * m + row) * width)[:, None] + term[None, :]
    b = right + ((head * n + column) * width)[None, :] + term[:, None]
    total = tl.zeros((M, N), dtype=tl.float64)
    for left_out in range(SLICES):
        # Pairs whose digits' numbers add up to SLICES - 1 - left_out.
        whole = tl.zeros((M, N), dtype=tl.int32)
        for t in range(0, (SLICES - left_out) * padded, K):
            x = tl.load(a + left_out * padded + t, mask=(row < m)[:, None], other=0)
            y = tl.load(b + t, mask=(column < n)[None, :], other=0)
            whole = tl.dot(x, y, whole, out_dtype=tl.int32)
        total = total * 0.00390625 + whole.to(tl.float64)
    left_power = tl.load(left_powers + head * m + row, mask=row < m, other=0.0)
    right_power = tl.load(right_powers + head * n + column, mask=column < n, other=0.0)
    to = out + ((head * m + row) * n)[:, None] + column[None, :]
    there = (row < m)[:, None] & (column < n)[None, :]
    tl.store(to, total * left_power[:, None] * right_power[None, :], mask=there)


def terms_at_once(terms: int) -> int:
    """What so many terms are padded to a multiple of."""
    return (OF_FEW_TERMS if terms <= FEW_TERMS else OF_MANY_TERMS).terms


def tile_of(heads: int, rows: int, columns: int, terms: int, processors: int) -> Tile:
    """The tile of a product on a device with so many processors."""
    if terms <= FEW_TERMS:
        return OF_FEW_TERMS
    programs = heads * -(-rows // OF_MANY_TERMS.rows) * -(-columns // OF_MANY_TERMS.columns)
    return OF_MANY_TERMS if programs >= processors else OF_FEW_PROGRAMS


def shapes_of_all_tiles(device: torch.device) -> list[tuple[int, int, int, int]]:
    """heads, rows, terms and columns of products that take each tile once."""
    few, many = 70, FEW_TERMS + 70
    wide = OF_MANY_TERMS.columns * processors_of(device)
    return [(2, 150, few, 130), (2, 150, many, 130), (1, 100, many, wide)]


def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors; 1 where programs are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def cut(x: torch.Tensor, factors: torch.Tensor, slices: int, *, largest_first: bool) -> torch.Tensor:
    """Digits [heads, rows, slices, terms padded with 0], int8, of x [heads, rows, terms] in any strides times
    factors [heads, rows] that make its numbers smaller than 2^(8 slices - 2)."""
    heads, rows, terms = x.shape
    at_once = terms_at_once(terms)
    padded = -(-terms // at_once) * at_once
    digits = torch.empty((heads, rows, slices, padded), dtype=torch.int8, device=x.device)
    grid = (triton.cdiv(rows, _CUT_ROWS), triton.cdiv(padded, _CUT_TERMS), heads)
    _cut[grid](
        x, factors.contiguous(), digits, rows, terms, padded, *x.stride(),
        HALVES=sum(128 << 8 * i for i in range(slices)), SLICES=slices, LARGEST_FIRST=largest_first,
        R=_CUT_ROWS, T=_CUT_TERMS, num_warps=4,
    )  # fmt: skip
    return digits


def multiply(
    left: torch.Tensor, right: torch.Tensor, left_powers: torch.Tensor, right_powers: torch.Tensor
) -> torch.Tensor:
    """[heads, m, n] in float64: left [heads, m, slices, k], smallest digits first, with right
    [heads, n, slices, k], largest first, times powers of two of rows and columns.

    The largest pair of digits counts 1.
    """
    (heads, m, slices, padded), n = left.shape, right.shape[1]
    tile = tile_of(heads, m, n, padded, processors_of(left.device))
    out = torch.empty((heads, m, n), dtype=torch.float64, device=left.device)
    _multiply[(triton.cdiv(m, tile.rows), triton.cdiv(n, tile.columns), heads)](
        left, right, left_powers.contiguous(), right_powers.contiguous(), out, m, n, padded,
        SLICES=slices, M=tile.rows, N=tile.columns, K=tile.terms,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
