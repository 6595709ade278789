"""The table of number types against torch's own."""

from __future__ import annotations

import pytest
import torch

from verify.kernels.numbers import FLOAT_TYPES, FloatType, type_of


@pytest.mark.parametrize("kind", FLOAT_TYPES.values(), ids=lambda kind: kind.name)
def test_the_table_is_what_torch_says(kind: FloatType) -> None:
    info = torch.finfo(kind.dtype)
    assert (kind.bits, 2.0**-kind.digits, 2.0**kind.least) == (
        info.bits,
        info.eps,
        info.smallest_normal * info.eps,
    )
    assert type_of(kind.dtype) is kind
    one = torch.ones((), dtype=torch.float64)
    if kind.name != "f32":
        # Halfway between two numbers is lost by u, and half the smallest number by tau.
        assert float((one + kind.u).to(kind.dtype) - one) in (0.0, 2 * kind.u)
        assert kind.u == info.eps / 2
        assert kind.tau == 2.0 ** (kind.least - 1)
        assert float(torch.tensor(kind.tau, dtype=torch.float64).to(kind.dtype)) == 0.0


def test_what_the_table_lacks_has_no_type() -> None:
    assert type_of(torch.float64) is None
