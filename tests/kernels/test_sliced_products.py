"""Products by slices: as good as float64's, from float32 products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import error_budget
from verify.kernels.exact import exact_attention
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel
from verify.kernels.sliced_products import BITS, CHUNK, sliced_bmm

SIZES = InputSizes(n_kv=(700, 300, 0), edges=(64, 256, 640))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_agrees_with_float64_to_1e_10(family: str) -> None:
    call = draw(family, SIZES, 2)
    size = error_budget(call, Arithmetic(cuts_at=lambda n: (0, n))).size
    exact, found = exact_attention(call), exact_attention(call, sliced_bmm)
    # Flat rows are sums of equal numbers: no product rounds.
    assert family == "flat" or not torch.equal(exact.out, found.out)
    # Relative to sum p |v|: elements may cancel.
    assert float(((found.out - exact.out).abs() / size.clamp(min=1e-300)).max()) < 1e-10
    seen = torch.isfinite(exact.lse)
    assert torch.equal(seen, torch.isfinite(found.lse))
    error = (found.lse - exact.lse)[seen].abs() / (1 + exact.lse[seen].abs())
    assert float(error.max()) < 1e-10


def test_float32_inputs_too() -> None:
    call = draw("gaussian", replace(SIZES, dtype=torch.float32), 1)
    exact, found = exact_attention(call), exact_attention(call, sliced_bmm)
    assert float((found.out - exact.out).abs().max()) < 1e-12


def test_products_of_slices_round_nothing() -> None:
    """The largest slices, over a whole chunk: float32 holds the sum."""
    assert 2 ** (2 * BITS) * CHUNK <= 2**24
    whole = torch.randint(-(2**52), 2**52, (1, 3, 2 * CHUNK)).double()
    other = torch.randint(-(2**10), 2**10, (1, 2 * CHUNK, 5)).double()
    expected = [
        [sum(int(x) * int(y) for x, y in zip(a, b, strict=True)) for b in other[0].T] for a in whole[0]
    ]
    found = sliced_bmm(whole, other)[0]
    error = max(abs(int(found[i, j]) - expected[i][j]) for i in range(3) for j in range(5))
    assert error < 2**62 * 2 * CHUNK * 2**-54


def test_the_kernel_takes_it_by_name() -> None:
    call = draw("gaussian", SIZES, 1)
    plain, sliced = (build_kernel(spec).run(call) for spec in ("exact", "exact:acc=double-float32"))
    torch.testing.assert_close(sliced.out, plain.out, rtol=2e-7, atol=1e-12)
    binaries = [{s.binary for _, _, s in result.launched.rows} for result in (plain, sliced)]
    assert binaries == [{"float64"}, {"double-float32"}]
