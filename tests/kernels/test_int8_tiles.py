"""Slices cut and multiplied by Triton, on its interpreter: the bits of products of whole matrices."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from support.triton_interpreter import interpreted
from verify.kernels.bits import same_bits
from verify.kernels.int8_products import SLICES, has_tiles, product_by_heads, tile_product

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: its interpreter cannot run the kernel", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a CUDA device is there: tests/cuda asks the same of it", allow_module_level=True)
with interpreted():
    from verify.kernels import int8_tiles


@pytest.fixture(autouse=True)
def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("slices", [2, SLICES])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 3, 2), (17, 31, 33), (33, 40, 32), (17, 65, 33)])
def test_the_bits_of_products_of_whole_matrices(
    monkeypatch: pytest.MonkeyPatch, m: int, k: int, n: int, slices: int
) -> None:
    small = {"FEW_TERMS": 32, "OF_FEW_TERMS": (16, 32, 32, 4, 1), "OF_MANY_TERMS": (32, 16, 64, 4, 1)}
    for name, value in small.items():
        monkeypatch.setattr(int8_tiles, name, int8_tiles.Tile(*value) if isinstance(value, tuple) else value)
    assert_bits_of_whole_matrices(2, m, k, n, slices)


@pytest.mark.parametrize("index", range(3))
def test_tiles_as_they_are(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """Each is what one of the shapes takes by which a device is asked for them."""
    monkeypatch.setattr(int8_tiles, "processors_of", lambda device: 9)
    heads, m, k, n = int8_tiles.shapes_of_all_tiles(torch.device("cpu"))[index]
    tile = (int8_tiles.OF_FEW_TERMS, int8_tiles.OF_FEW_PROGRAMS, int8_tiles.OF_MANY_TERMS)[index]
    assert int8_tiles.tile_of(heads, m, n, k, 9) == tile
    assert int8_tiles.terms_at_once(k) == tile.terms
    with monkeypatch.context() as patch:
        patch.setattr(int8_tiles, "tile_of", lambda *shape: tile)
        assert_bits_of_whole_matrices(1, 3, k, 2, slices=2)


def assert_bits_of_whole_matrices(heads: int, m: int, k: int, n: int, slices: int) -> None:
    g = torch.Generator().manual_seed(m)
    a = torch.randn(heads, m, k, generator=g, dtype=torch.float64)
    a = a * torch.exp(9 * torch.randn(heads, m, k, generator=g, dtype=torch.float64))
    # As keys lie in memory: terms side by side.
    b = torch.randn(heads, n, k, generator=g, dtype=torch.float64).transpose(1, 2)
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
