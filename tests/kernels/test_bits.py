"""What is equal to the bit: one meaning for verdicts, controls, laws and probes."""

from __future__ import annotations

import math

import pytest
import torch

from verify.kernels.bits import different, not_finite, same_bits
from verify.kernels.merge import Part
from verify.laws.law import LawBroken
from verify.laws.tolerance import no_bit_moves

NAN = float("nan")


def test_zeros_of_both_signs_are_the_same_and_so_are_nans() -> None:
    a = torch.tensor([0.0, NAN, 1.0, float("inf")])
    b = torch.tensor([-0.0, NAN, 1.0, float("inf")])
    # Another pattern of bits, still not a number.
    b.view(torch.int32)[1] += 1
    assert same_bits(a, b)
    assert not different(a, b).any()
    no_bit_moves("zeros", Part(a[:, None], a), Part(b[:, None], b))


@pytest.mark.parametrize(("place", "value"), [(0, 1e-45), (1, 1.0), (2, 1.0000001), (3, NAN)])
def test_anything_else_differs(place: int, value: float) -> None:
    a = torch.tensor([0.0, NAN, 1.0, float("inf")])
    b = a.clone()
    b[place] = value
    assert not same_bits(a, b) and not same_bits(b, a)
    assert different(a, b).nonzero().flatten().tolist() == [place]
    with pytest.raises(LawBroken, match="1 of 4 differ"):
        no_bit_moves("one", Part(a[:, None], a), Part(b[:, None], b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_finite_is_seen_in_every_type(dtype: torch.dtype) -> None:
    kind = torch.finfo(dtype)
    x = torch.tensor([0.0, kind.max, kind.min, kind.tiny, NAN, math.inf, -math.inf], dtype=dtype)
    assert not_finite(x).tolist() == [False] * 4 + [True] * 3 == (~torch.isfinite(x)).tolist()


def test_other_types_and_shapes_are_not_the_same() -> None:
    a = torch.ones(4)
    assert not same_bits(a, a.double())
    assert not same_bits(a, a[:2])
