"""Products of float64 matrices from products of int8 slices, which integer tensor cores add up exactly.

Every row of a and every column of b is scaled by a power of two, so that its numbers lie below 1, and rounded
to a whole number X of 8 L - 2 bits, which is written in L digits d of eight bits, from -128 to 127:

    x = 2^e X / 2^(8 L - 2) + rest      |rest| <= 2^(e + 1 - 8 L)      X = sum_i d_i 256^(L - 1 - i)

so digit i of x is worth at most 2^(e + 1 - 8 i). Pairs of digits i + j = g are one product of int8 matrices,
whose terms are those of g + 1 products: at most L k 2^14 < 2^31 in int32, for k up to TERMS at once. The sums
C_g of g < L are added up in float64, smallest first; pairs of g >= L are left out. For 2^e > |x|:

    |found - a b| <= k 2^(e_a + e_b) ((L + 1) 2^(2 - 8 L) + (1 + chunks) 2^-52)

of which 2^(2 - 8 L) is the rests, twice 2^(1 - 8 L), each times the other operand; (L - 1) 2^(2 - 8 L), and
a 255th more, the pairs left out, of which there are 2 L - 1 - g of each g; the last the float64 additions:
those inside a chunk shrink by 256 each, so two unit roundoffs are enough for them, and for one more a chunk.
With L = 7 the first is 2^-51, as the second: an eighth slice would be lost in float64's own rounding. With
six it is 2^-43.2, and 1e-10 = 2^-33.2 of sum p |v| would be kept only where n_kv max |v| < 1000 sum p |v|.

Sources: K. Ozaki, T. Ogita, S. Oishi, S. Rump, Error-free transformations of matrix multiplication by using
fast routines of matrix multiplication and its applications, 2012; H. Ootomo, K. Ozaki, R. Yokota, DGEMM on
integer matrix multiplication unit, 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from verify.kernels.here import why_not_flash

SLICES = 7
# Terms of one product: SLICES * TERMS * 128^2 is below 2^31.
TERMS = 1 << 14
# What `torch._int_mm` takes on a GPU: more than 16 rows, and terms and columns that are multiples of 8; rows
# of 16 bytes are read fastest.
_LEAST_ROWS, _MULTIPLE = 32, 16
# The largest digits of numbers below 1 count 2^-6.
_OF_LARGEST = 6
# Exponents of rows: what is smaller than 2^-400 counts as if it were that large.
_LEAST_EXPONENT = -400

IntegerProduct = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def int8_bmm(a: torch.Tensor, b: torch.Tensor, slices: int = SLICES) -> torch.Tensor:
    """a [h, m, k] times b [h, k, n], float64 in and out, to within `int8_error_bound`.

    Numbers that are not finite have no slices: with one of them it is float64's product. Slices are `slices`
    bytes a number, of all heads at once where `int8_tiles` cuts them, else of one, and a few times that then.

    >>> a, b = torch.rand(2, 3, 40, dtype=torch.float64), torch.rand(2, 40, 5, dtype=torch.float64)
    >>> bool(((int8_bmm(a, b) - a @ b).abs() <= int8_error_bound(a, b)).all())
    True
    """
    (heads, m, k), n = a.shape, b.shape[2]
    if 0 in (heads, m, k, n):
        return torch.bmm(a, b)
    largest_a, largest_b = _largest(a, 2), _largest(b, 1)
    if not bool(torch.isfinite(largest_a.sum() + largest_b.sum())):
        return torch.bmm(a, b)
    exponents = _exponents(largest_a), _exponents(largest_b)
    product = tile_product if has_tiles(a.device) else product_by_heads
    out = product(a[:, :, :TERMS], b[:, :TERMS], *exponents, slices)
    for first in range(TERMS, k, TERMS):
        chunk = slice(first, first + TERMS)
        out += product(a[:, :, chunk], b[:, chunk], *exponents, slices)
    return out


def tile_product(
    a: torch.Tensor, b: torch.Tensor, e_a: torch.Tensor, e_b: torch.Tensor, slices: int
) -> torch.Tensor:
    """a [h, m, k] times b [h, k, n] in `int8_tiles`, k up to TERMS; rows and columns below 2^e_a, 2^e_b."""
    tiles, most = _tiles(), 8 * slices - 2
    left = tiles.cut(a, _power(most - e_a), slices, largest_first=False)
    right = tiles.cut(b.transpose(1, 2), _power(most - e_b), slices, largest_first=True)
    product: torch.Tensor = tiles.multiply(left, right, _power(e_a - _OF_LARGEST), _power(e_b - _OF_LARGEST))
    return product


def product_by_heads(
    a: torch.Tensor, b: torch.Tensor, e_a: torch.Tensor, e_b: torch.Tensor, slices: int
) -> torch.Tensor:
    """The same, bits included, by an integer product of whole matrices, a head at a time."""
    (heads, m, _), n = a.shape, b.shape[2]
    multiply, out = integer_product(a.device), a.new_empty((heads, m, n))
    for head in range(heads):
        left = _digits(a[head], e_a[head], slices, rows=_LEAST_ROWS)
        right = _digits(b[head].t(), e_b[head], slices, rows=1).flip(1)
        total = _product(left.flatten(1), right.flatten(1), slices, multiply)
        scaled = total[:m, :n] * _power(e_a[head] - _OF_LARGEST)[:, None]
        torch.mul(scaled, _power(e_b[head] - _OF_LARGEST), out=out[head])
    return out


def int8_error_bound(a: torch.Tensor, b: torch.Tensor, slices: int = SLICES) -> torch.Tensor:
    """What each number of `int8_bmm(a, b, slices)` may be off by, [h, m, n], of finite a and b."""
    k = a.shape[2]
    e_a, e_b = _exponents(_largest(a, 2)), _exponents(_largest(b, 1))
    share = (slices + 1) * 2.0 ** (2 - 8 * slices) + (1 + math.ceil(k / TERMS)) * 2.0**-52
    return k * share * _power(e_a)[:, :, None] * _power(e_b)[:, None, :]


@cache
def integer_product(device: torch.device) -> IntegerProduct:
    """int8 [m, k] times int8 [k, n], exact: `torch._int_mm` where it is, else the same in float64.

    It is asked the largest digits first: instructions for bytes exist that saturate at 16 bits.
    """
    return torch._int_mm if has_int8_products(device) else _in_float64


@cache
def has_int8_products(device: torch.device) -> bool:
    """Whether `torch._int_mm` multiplies whole bytes exactly on this device."""
    low = torch.full((_LEAST_ROWS, 256), -128, dtype=torch.int8, device=device)
    high = torch.full_like(low, 127)
    try:
        found = [torch._int_mm(a, b.t()) for a in (low, high) for b in (low, high)]
    except RuntimeError:
        return False
    due = [256 * a * b for a in (-128, 127) for b in (-128, 127)]
    return all(bool((x == y).all()) for x, y in zip(found, due, strict=True))


@cache
def has_tiles(device: torch.device) -> bool:
    """Whether `int8_tiles` runs on this device, and gives the bits of `product_by_heads`."""
    if device.type != "cuda" or why_not_flash() is not None:
        return False
    # Triton has no products of bytes before, and prints its whole program where it is asked for one.
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return all(_has_tile(device, *shape) for shape in _tiles().shapes_of_all_tiles(device))


def _has_tile(device: torch.device, heads: int, m: int, k: int, n: int) -> bool:
    """Whether the tile of such a product does."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        for shape in ((heads, m, k), (heads, k, n))
    )
    exponents = _exponents(_largest(a, 2)), _exponents(_largest(b, 1))
    try:
        found = tile_product(a, b, *exponents, SLICES)
    except Exception:  # whatever a compiler says of a card that it does not know
        return False
    return torch.equal(found, product_by_heads(a, b, *exponents, SLICES))


@cache
def _tiles() -> Any:
    """The module of device code; importing it decides whether Triton compiles or interprets it."""
    from verify.kernels import int8_tiles

    return int8_tiles


def _in_float64(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a.double(), b.double())


def _product(left: torch.Tensor, right: torch.Tensor, slices: int, multiply: IntegerProduct) -> torch.Tensor:
    """The sum over pairs of digits [m, n], whose largest count 1: of left [m, L k], whose last k columns are
    the largest digits, and right [n, L k], whose first are."""
    k = left.shape[1] // slices
    total: torch.Tensor | None = None
    for g in reversed(range(slices)):
        whole = multiply(left[:, (slices - 1 - g) * k :], right[:, : (g + 1) * k].t())
        total = whole.double() if total is None else torch.add(whole, total, alpha=2.0**-8)
    assert total is not None
    return total


def _digits(x: torch.Tensor, exponents: torch.Tensor, slices: int, *, rows: int) -> torch.Tensor:
    """The digits of x [m, k] below 2^exponents [m], int8 [m', slices, k'], smallest first, padded with 0.

    A number in two's complement is one of unsigned bytes; 128 added to each, and taken away again within it,
    leaves signed ones.
    """
    m, k = x.shape
    padded = (-k % _MULTIPLE, max(-m % _MULTIPLE, rows - m))
    whole = (x * _power(8 * slices - 2 - exponents)[:, None]).round_()
    whole = whole.to(torch.int64, memory_format=torch.contiguous_format)
    if any(padded):
        whole = torch.nn.functional.pad(whole, (0, padded[0], 0, padded[1]))
    halves = sum(128 << 8 * i for i in range(slices))
    digits = whole.add_(halves).bitwise_xor_(halves).view(torch.int8).view(*whole.shape, 8)
    return digits[:, :, :slices].transpose(1, 2).contiguous()


def _largest(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The largest size along a dimension; NaN where there is one."""
    least, most = torch.aminmax(x, dim=dim)
    return torch.maximum(most, -least)


def _exponents(largest: torch.Tensor) -> torch.Tensor:
    """e with 2^e > largest."""
    return torch.frexp(largest).exponent.clamp(min=_LEAST_EXPONENT)


def _power(exponents: torch.Tensor) -> torch.Tensor:
    """2^exponents in float64, from its bits: no library's power of two need be exact."""
    return ((exponents.long() + 1023) << 52).view(torch.float64)
