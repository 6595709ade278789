from __future__ import annotations

import math

import pytest
import torch

from verify.kernels.exponentials import LEAST_EXPONENTS, flushed_exp_


def around(least: float, dtype: torch.dtype) -> torch.Tensor:
    """The 200 numbers on each side of the least exponent, and it."""
    found = [torch.tensor(least, dtype=dtype)]
    for way in (-torch.inf, torch.inf):
        at = found[0]
        for _ in range(200):
            at = torch.nextafter(at, at.new_tensor(way))
            found.append(at)
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_are_those_of_exp_but_below_the_least_exponent(dtype: torch.dtype) -> None:
    least = LEAST_EXPONENTS[dtype]
    drawn = torch.linspace(2 * least, 5, 10_007, dtype=dtype)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, -1e30, 80.0], dtype=dtype)
    for x in (around(least, dtype), drawn, special, drawn[drawn > least], special[:0]):
        due = torch.where(x <= torch.tensor(least, dtype=dtype), 0.0, x.exp())
        found = x.clone()
        assert flushed_exp_(found) is found
        assert torch.equal(found.isnan(), due.isnan())
        assert torch.equal(found.nan_to_num(), due.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_result_is_a_subnormal_number(dtype: torch.dtype) -> None:
    found = flushed_exp_(torch.linspace(2 * LEAST_EXPONENTS[dtype], 0, 10_007, dtype=dtype))
    assert not ((found > 0) & (found < torch.finfo(dtype).tiny)).any()
    assert (found == 0).any()
    assert (found > 0).any()


def test_a_strided_view_is_written_in_place() -> None:
    whole = torch.full((4, 6), -200.0)
    flushed_exp_(whole[:, ::2])
    assert whole[:, ::2].eq(0).all()
    assert whole[:, 1::2].eq(-200).all()
