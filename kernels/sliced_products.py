"""Matrix products to nearly float64's accuracy from float32 products that round nothing.

Most GPUs multiply float64 at 1/32 or 1/64 of float32's rate, while adding it costs only memory traffic.
Each operand, scaled by a power of two a row, is written as a sum of slices, whole numbers of BITS bits over
falling powers of two. A product of two slices over CHUNK terms is a whole number up to 2^24, so float32 holds
it and every partial sum exactly, in any order; the products of slices are added up in float64.

    x = 2^e sum_i 2^(-BITS (i+1)) a_i       |a_i| <= 2^BITS        2^(2 BITS) CHUNK <= 2^24

Pairs of slices whose power lies below 2^-(BITS SLICES) are left out: relative to the largest entries of a row
and a column that is 2^-56 a term. Source: K. Ozaki, T. Ogita, S. Oishi, S. Rump, Error-free transformations
of matrix multiplication by using fast routines of matrix multiplication and its applications, 2012.
"""

from __future__ import annotations

import torch

BITS, CHUNK, SLICES = 8, 256, 7


def sliced_bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [h, m, k] times b [h, k, n], float64 in and out. TF32 must be off, as torch's default is."""
    out = a.new_zeros((a.shape[0], a.shape[1], b.shape[2]))
    for first in range(0, a.shape[2], CHUNK):
        chunk = slice(first, first + CHUNK)
        left, e_left = _slices(a[:, :, chunk], dim=2)
        right, e_right = _slices(b[:, chunk], dim=1)
        total = torch.zeros_like(out)
        for i, x in enumerate(left):
            for j, y in enumerate(right[: SLICES - i]):
                total.add_(torch.bmm(x, y).double(), alpha=2.0 ** (-BITS * (i + j + 2)))
        out += torch.ldexp(total, e_left + e_right)
    return out


def _slices(x: torch.Tensor, *, dim: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Slices of x [h, ...] as float32, at most SLICES, and the exponents that they are scaled by, `dim` 1."""
    exponent = torch.frexp(x.abs().amax(dim, keepdim=True)).exponent
    rest = torch.ldexp(x, -exponent)  # below 1
    slices: list[torch.Tensor] = []
    for i in range(SLICES):
        whole = torch.round(torch.ldexp(rest, torch.tensor(BITS * (i + 1), device=x.device)))
        slices.append(whole.float())
        rest = rest - torch.ldexp(whole, torch.tensor(-BITS * (i + 1), device=x.device))
        if not rest.any():
            # float16 numbers of like size need three or four.
            break
    return slices, exponent
