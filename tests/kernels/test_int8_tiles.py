"""Slices cut and multiplied by Triton, on its interpreter: the bits of products of whole matrices."""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest
import torch

from verify.kernels.bits import same_bits
from verify.kernels.int8_products import SLICES, has_tiles, product_by_heads, tile_product

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: its interpreter cannot run the kernel", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a CUDA device is there: tests/cuda asks the same of it", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"
try:
    import triton.language as tl

    # As in `test_flash`: torch may have imported Triton with functions that are to be compiled.
    importlib.reload(tl.standard)
    for _name in tl.__all__:
        if hasattr(tl.standard, _name):
            setattr(tl, _name, getattr(tl.standard, _name))
    from verify.kernels import int8_tiles
finally:
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(int8_tiles, "TILE", int8_tiles.Tile(16, 32, 32, 4, 1))


@pytest.mark.parametrize("slices", [2, SLICES])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 3, 2), (17, 40, 33), (33, 32, 32)])
def test_the_bits_of_products_of_whole_matrices(m: int, k: int, n: int, slices: int) -> None:
    g = torch.Generator().manual_seed(m)
    a = torch.randn(2, m, k, generator=g, dtype=torch.float64)
    a = a * torch.exp(9 * torch.randn(2, m, k, generator=g, dtype=torch.float64))
    # As keys lie in memory: terms side by side.
    b = torch.randn(2, n, k, generator=g, dtype=torch.float64).transpose(1, 2)
    a[0, 0, 0], a[0, -1] = -0.0, 0.0
    exponents = [torch.frexp(x.abs().amax(dim)).exponent for x, dim in ((a, 2), (b, 1))]
    found = tile_product(a, b, *exponents, slices)
    assert same_bits(found + 0.0, product_by_heads(a, b, *exponents, slices) + 0.0)


def test_numbers_halfway_between_two_are_rounded_to_even() -> None:
    """Up to the largest, where there are no fractions."""
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 2.0**51 + 0.5, -(2.0**51) - 1.5, 2.0**52 + 1, 2.0**54])
    halves = halves.double()
    digits = int8_tiles.cut(halves[None, None], torch.ones(1, 1).double(), SLICES, largest_first=False)
    weights = torch.tensor([256**i for i in range(SLICES)])
    found = (digits[0, 0, :, : len(halves)].long() * weights[:, None]).sum(0)
    assert found.tolist() == halves.round().long().tolist()


def test_a_cpu_has_no_tiles() -> None:
    assert not has_tiles(torch.device("cpu"))
