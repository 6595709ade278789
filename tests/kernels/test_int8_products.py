"""Products by int8 slices: within their bound, the same bits again, attention as in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from support.random_calls import RandomCall, random_calls
from verify.kernels import int8_products
from verify.kernels.bits import same_bits
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import error_budget
from verify.kernels.call import Call
from verify.kernels.exact import exact_attention, reference_attention
from verify.kernels.int8_products import SLICES, TERMS, has_int8_products, int8_bmm, int8_error_bound
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel

SIZES = InputSizes(n_kv=(700, 300, 0), edges=(64, 256, 640))
CPU = torch.device("cpu")


def numbers(*shape: int, spread: float, seed: int) -> torch.Tensor:
    """Normal numbers, times powers of e of that deviation."""
    g = torch.Generator().manual_seed(seed)
    x, grown = (torch.randn(*shape, generator=g, dtype=torch.float64) for _ in range(2))
    return x * torch.exp(spread * grown)


def errors(a: torch.Tensor, b: torch.Tensor, slices: int = SLICES) -> np.ndarray:
    """What the product in slices is off by, against numbers of 64 bits."""
    wide = [x.numpy().astype(np.longdouble) for x in (a, b)]
    return np.abs(int8_bmm(a, b, slices).numpy() - np.einsum("hmk,hkn->hmn", *wide))


def agreement(call: Call, slices: int = SLICES) -> float:
    """The largest difference of exact attention in slices and in float64, in units of sum p |v|."""
    size = error_budget(call, Arithmetic(cuts_at=lambda n: (0, n))).size
    found = exact_attention(call, partial(int8_bmm, slices=slices))
    exact = exact_attention(call)
    seen = torch.isfinite(exact.lse)
    assert torch.equal(seen, torch.isfinite(found.lse))
    lse = (found.lse - exact.lse)[seen].abs() / (1 + exact.lse[seen].abs())
    out = (found.out - exact.out).abs() / size.clamp(min=1e-300)
    return max(float(out.max()), float(lse.max()))


@pytest.mark.parametrize("slices", range(1, SLICES + 1))
@pytest.mark.parametrize(("terms", "spread"), [(1, 3.0), (7, 0.0), (64, 3.0), (1000, 1.0)])
def test_errors_are_within_the_bound(slices: int, terms: int, spread: float) -> None:
    a, b = numbers(2, 33, terms, spread=spread, seed=1), numbers(2, terms, 9, spread=0.5, seed=2)
    assert (errors(a, b, slices) <= int8_error_bound(a, b, slices).numpy()).all()


@pytest.mark.parametrize("slices", range(1, SLICES))
def test_the_bound_says_something(slices: int) -> None:
    """One less slice would break it; with the number that is used it is a few roundings of float64."""
    a, b = numbers(2, 33, 64, spread=3.0, seed=1), numbers(2, 64, 9, spread=0.5, seed=2)
    assert (errors(a, b, slices) > int8_error_bound(a, b, slices + 1).numpy()).any()
    largest = float(int8_error_bound(torch.ones(1, 1, 64).double(), torch.ones(1, 64, 1).double()))
    assert 2.0**-53 * 64 < largest < 2.0**-47 * 64


def test_the_largest_digits_over_the_most_terms_stay_in_int32() -> None:
    assert SLICES * TERMS * 128 * 128 < 2**31
    # -128 in every digit but the first, which is -64: the number next to -1 in so many bits.
    extreme = -(64 * 256.0**6 + 128 * sum(256.0**i for i in range(6))) / 2.0 ** (8 * SLICES - 2)
    a = torch.full((1, 2, 2 * TERMS + 5), extreme, dtype=torch.float64)
    b = a.transpose(1, 2).contiguous()
    assert (errors(a, b) <= int8_error_bound(a, b).numpy()).all()


def test_whole_numbers_are_multiplied_exactly() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randint(-(2**20), 2**20, (3, 5, 300), generator=g).double()
    b = torch.randint(-(2**20), 2**20, (3, 300, 4), generator=g).double()
    assert torch.equal(int8_bmm(a, b), (a.long() @ b.long()).double())


def test_a_row_has_its_bits_alone_and_again() -> None:
    a, b = numbers(2, 40, 100, spread=1.0, seed=1), numbers(2, 100, 24, spread=1.0, seed=2)
    found = int8_bmm(a, b)
    assert same_bits(found, int8_bmm(a, b))
    # However its numbers lie in memory.
    turned = a.transpose(1, 2).contiguous().transpose(1, 2), b.transpose(1, 2).contiguous().transpose(1, 2)
    assert same_bits(found, int8_bmm(*turned))
    assert same_bits(found[1:, 7:8, 3:4], int8_bmm(a[1:, 7:8], b[1:, :, 3:4].contiguous()))


@pytest.mark.parametrize("odd", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_float64s(odd: float) -> None:
    a, b = numbers(1, 3, 8, spread=0.0, seed=1), numbers(1, 8, 2, spread=0.0, seed=2)
    b[0, 3, 1] = odd
    assert same_bits(int8_bmm(a, b), torch.bmm(a, b))


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0)])
def test_empty_products(shape: tuple[int, int, int, int]) -> None:
    h, m, k, n = shape
    found = int8_bmm(torch.ones(h, m, k).double(), torch.ones(h, k, n).double())
    assert found.shape == (h, m, n) and not found.any()


def test_sizes_far_from_one() -> None:
    """Columns of 1e-300 and 1e300 side by side: each has its own power of two."""
    a, b = numbers(1, 3, 50, spread=0.0, seed=1), numbers(1, 50, 4, spread=0.0, seed=2)
    sizes = torch.tensor([1e-90, 1e-30, 1e30, 1e300], dtype=torch.float64)
    assert (errors(a, b * sizes) <= int8_error_bound(a, b * sizes).numpy()).all()
    found = int8_bmm(a, b * 2.0**-60)
    assert same_bits(found, int8_bmm(a, b) * 2.0**-60)


def test_an_instruction_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of bytes that are added up in 16 bits, as processors without VNNI do."""

    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pairs = a.int()[:, :, None] * b.int()
        sums = (pairs[:, ::2] + pairs[:, 1::2]).clamp(-(2**15), 2**15 - 1)
        return sums.sum(1)

    for each in (has_int8_products, int8_products.integer_product):
        each.cache_clear()
    try:
        monkeypatch.setattr(torch, "_int_mm", saturating)
        assert not has_int8_products(CPU)
        a, b = numbers(1, 33, 64, spread=0.0, seed=1), numbers(1, 64, 9, spread=0.0, seed=2)
        assert (errors(a, b) <= int8_error_bound(a, b).numpy()).all()
    finally:
        monkeypatch.undo()
        for each in (has_int8_products, int8_products.integer_product):
            each.cache_clear()


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_agrees_with_float64_to_1e_10(family: str) -> None:
    assert agreement(draw(family, SIZES, 3)) < 1e-10


def test_float32_inputs_agree_too() -> None:
    assert agreement(draw("massive", replace(SIZES, dtype=torch.float32), 1)) < 1e-10


@pytest.mark.parametrize("slices", [SLICES - 1, SLICES - 2])
def test_fewer_slices_do_not_agree(slices: int) -> None:
    assert agreement(draw("peaked", SIZES, 2), slices) > 1e-10


@settings(max_examples=12, deadline=None)
@given(random_calls())
def test_random_calls_of_all_forms(drawn: RandomCall) -> None:
    """Windows, sinks, masks, lists of keys, pages, packed rows: as near to the formula as float64 is."""
    call = drawn.call()
    found, plain = exact_attention(call, int8_bmm), reference_attention(call)
    digits = (1e-10 + 2.0**-50 * plain.lse.abs()).nan_to_num(posinf=0.0)
    assert bool(((found.out - plain.out).abs() <= digits[..., None] * 100).all())
    assert bool(((found.lse == plain.lse) | ((found.lse - plain.lse).abs() <= digits)).all())


def test_the_kernel_takes_it_by_name() -> None:
    call = draw("gaussian", SIZES, 1)
    plain, sliced = (build_kernel(spec).run(call) for spec in ("exact:acc=float64", "exact:acc=int8"))
    torch.testing.assert_close(sliced.out, plain.out, rtol=2e-7, atol=1e-12)
    binaries = [{s.binary for _, _, s in result.launched.rows} for result in (plain, sliced)]
    assert binaries == [{"float64"}, {"int8"}]
