"""Products in int8 slices on a CUDA device: the bits of the CPU, by tiles and by whole matrices."""

from __future__ import annotations

import pytest
import torch

from verify.kernels.bits import same_bits
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import error_budget
from verify.kernels.exact import exact_attention
from verify.kernels.int8_products import (
    SLICES,
    has_int8_products,
    has_tiles,
    int8_bmm,
    product_by_heads,
    tile_product,
)
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.oracle_products import timed_products

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda", 0)


def test_the_device_has_both_ways() -> None:
    assert has_int8_products(CUDA) and has_tiles(CUDA)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 3, 2), (17, 70, 40), (300, 128, 513), (129, 5000, 128)])
@pytest.mark.parametrize("slices", [1, 4, SLICES])
def test_bits_are_those_of_the_cpu(m: int, k: int, n: int, slices: int) -> None:
    g = torch.Generator().manual_seed(m)
    a = torch.randn(2, m, k, generator=g, dtype=torch.float64)
    a = a * torch.exp(9 * torch.randn(2, m, k, generator=g, dtype=torch.float64))
    b = torch.randn(2, n, k, generator=g, dtype=torch.float64).transpose(1, 2)
    exponents = [torch.frexp(x.abs().amax(dim)).exponent for x, dim in ((a, 2), (b, 1))]
    due = product_by_heads(a, b, *exponents, slices)
    on_device = [x.to(CUDA) for x in (a, b, *exponents)]
    for product in (tile_product, product_by_heads):
        assert torch.equal(product(*on_device, slices).cpu(), due)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_agrees_with_float64(family: str) -> None:
    call = draw(family, InputSizes(n_kv=tuple(range(1000, 1100))), 0).on(CUDA)
    found, exact = exact_attention(call, int8_bmm), exact_attention(call)
    size = error_budget(call, Arithmetic(cuts_at=lambda n: (0, n))).size
    assert float(((found.out - exact.out).abs() / size.clamp(min=1e-300)).max()) < 1e-10
    assert same_bits(found.out, exact_attention(call, int8_bmm).out)


def test_float64_is_kept_where_it_is_in_hardware() -> None:
    timed = timed_products(CUDA)
    assert (timed.chosen == "int8") == (timed.int8_s * 2 <= timed.float64_s)
