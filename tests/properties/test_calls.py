"""Random calls in all forms at once: `eager` within its budget of `exact`, and nothing raised but our own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.random_calls import RandomCall, random_calls
from verify.kernels.bits import same_bits
from verify.kernels.budget.bound import error_budget
from verify.kernels.exact import exact_attention, reference_attention
from verify.kernels.judging.detectors import SUSPICIONS, findings, measure
from verify.kernels.judging.figures import budget_ratio
from verify.kernels.registry import build_kernel

SPECS = [
    "eager", "eager:kv=3,block=16", "eager:p=f32,kv=2,block=16", "eager:p=bf16,heads=split", "eager:out=f16",
    "eager:acc=f16,block=16", "eager:kv=size:32,block=32,heads=split",
]  # fmt: skip


def keeps(drawn: RandomCall, spec: str) -> None:
    call, kernel = drawn.call(), build_kernel(spec)
    result = kernel.run(call)
    budget = error_budget(call, kernel.arithmetic_of(call))
    exact, plain = exact_attention(call), reference_attention(call)
    # Three ways to the exact result. Where all logits are -1e9 and less, float64 has few digits of them too.
    digits = (1e-10 + 2.0**-50 * plain.lse.abs()).nan_to_num(posinf=0.0)
    for other in (exact, budget):
        assert bool(((other.out - plain.out).abs() <= digits[..., None] * 100).all())
        assert bool(((other.lse == plain.lse) | ((other.lse - plain.lse).abs() <= digits)).all())
    for got, due, bound in (
        (result.out, budget.out, budget.bound), (result.lse, budget.lse, budget.lse_bound),
    ):  # fmt: skip
        error = torch.where(got == due, 0.0, got.double() - due)
        assert not error.numel() or float(budget_ratio(error, bound).max()) <= 1
    assert not [name for name, x in budget._asdict().items() if bool(x.isnan().any())]
    if result.out.numel():
        said = findings(measure(call, result, kernel.arithmetic_of(call), distinct=False, budget=budget))
        assert {finding.detector for finding in said} <= SUSPICIONS, said
    assert sum(result.launched.rows.values()) == call.kv_len.numel()
    # A row of `several` has the plan, and the bits, that it has alone.
    if call.path == "several":
        alone = kernel.run(RandomCall(**{**vars(drawn), "path": "decode"}).call())
        assert same_bits(result.out, alone.out) and same_bits(result.lse, alone.lse)


@settings(max_examples=100, deadline=None)
@given(random_calls(), st.sampled_from(SPECS))
def test_random_calls_are_within_budget(drawn: RandomCall, spec: str) -> None:
    keeps(drawn, spec)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=20_000, deadline=None)
@given(random_calls(), st.sampled_from(SPECS))
def test_twenty_thousand_random_calls_are_within_budget(drawn: RandomCall, spec: str) -> None:
    keeps(drawn, spec)
