"""What is equal to the bit: one meaning for verdicts, controls, laws and probes."""

from __future__ import annotations

import pytest
import torch

from verify.kernels.bits import different, same_bits
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


def test_other_types_and_shapes_are_not_the_same() -> None:
    a = torch.ones(4)
    assert not same_bits(a, a.double())
    assert not same_bits(a, a[:2])
