"""The error budget, over random problems: never exceeded by a correct kernel, not slack, and right itself."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.subjects import assert_keeps
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import error_budget
from verify.kernels.call import Call
from verify.kernels.exact import exact_attention
from verify.kernels.heads import Heads
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.figures import budget_ratio
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel
from verify.laws import LAWS, subject_of
from verify.laws.run import run_law

SPECS = [
    "eager", "eager:kv=3,block=16", "eager:p=f32", "eager:p=bf16", "eager:out=f16", "eager:out=bf16",
    "eager:acc=f16", "eager:heads=split,kv=size:32,block=32", "eager:p=f32,kv=2,block=16,out=f16",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Problems are small here: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def sizes(draw: st.DrawFn) -> InputSizes:
    longest = draw(st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 150, 300]))
    rows = draw(st.lists(st.integers(0, longest), max_size=2))
    return InputSizes(
        n_kv=(longest, *rows),
        heads=Heads.grouped(
            kv=draw(st.integers(1, 2)),
            ratio=draw(st.integers(1, 3)),
            k_size=draw(st.sampled_from([16, 32, 64])),
            v_size=draw(st.sampled_from([16, 32])),
        ),
        spare=draw(st.integers(0, 3)),
        edges=(16, 64, 128),
        dtype=draw(st.sampled_from([torch.float16, torch.float16, torch.bfloat16])),
        path=draw(st.sampled_from(["decode", "prefill"])),
    )


def worst(call: Call, spec: str) -> tuple[float, float]:
    """Largest |error| / bound of out (vacuous rows left aside) and of lse."""
    kernel = build_kernel(spec)
    result = kernel.run(call)
    budget = error_budget(call, kernel.arithmetic(call.shape, call.path))
    lse = torch.where(torch.isneginf(budget.lse) & torch.isneginf(result.lse), 0.0, result.lse - budget.lse)
    ratio = budget_ratio(result.out - budget.out, budget.bound)
    return float(ratio.max()), float(budget_ratio(lse, budget.lse_bound).max())


@pytest.mark.parametrize("spec", SPECS)
def test_a_correct_kernel_never_exceeds_its_budget(spec: str) -> None:
    assert_keeps(LAWS["within-budget"], subject_of(spec), examples=30)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_nor_in_a_thousand_cases(spec: str) -> None:
    assert_keeps(LAWS["within-budget"], subject_of(spec), examples=1000)


def test_float16_accumulators_overflow_and_that_is_said() -> None:
    result = run_law(LAWS["large-values"], subject_of("eager:acc=f16"), examples=50, shrink=False)
    assert result.state == "broken"


def test_the_budget_is_not_slack() -> None:
    """Median over families and kernels of the largest |error| / bound."""
    ratios = sorted(
        worst(draw(family, InputSizes(n_kv=(200, 65)), seed=1), spec)[0]
        for family in FAMILIES
        for spec in SPECS[:6]
    )
    assert ratios[-1] <= 1
    assert ratios[len(ratios) // 2] > 0.05, ratios


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_oracle_errs_by_less_than_a_thousandth_of_the_budget(family: str) -> None:
    call = draw(
        family,
        InputSizes(n_kv=(40,), heads=Heads.grouped(kv=1, ratio=2, k_size=16, v_size=4), edges=(16, 32)),
        seed=3,
    )
    tight = error_budget(call, Arithmetic(p="f32", cuts_at=lambda n: (0, n)))
    truth, lse = in_mpmath(call)
    exact = exact_attention(call)
    assert float(budget_ratio(exact.out - truth, tight.bound).max()) < 1e-3
    assert float(budget_ratio(tight.out - truth, tight.bound).max()) < 1e-3
    assert float(budget_ratio(exact.lse - lse, tight.lse_bound).max()) < 1e-3


def in_mpmath(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of one row in 60 digits, written down from the contract and from nothing else."""
    n, heads, r = int(call.kv_len[0, 0]), call.shape.q_heads, call.shape.ratio
    out = torch.zeros(1, 1, heads, call.shape.v_size, dtype=torch.float64)
    lse = torch.zeros(1, 1, heads, dtype=torch.float64)
    with mpmath.workdps(60):
        for h in range(heads):
            q = [mpmath.mpf(x) for x in call.q[0, 0, h].tolist()]
            weights, total = [], mpmath.mpf(0)
            for j in range(n):
                dot = mpmath.fdot(q, [mpmath.mpf(x) for x in call.k[0, j, h // r].tolist()])
                s = mpmath.mpf(call.scale) * dot
                if call.softcap is not None:
                    s = call.softcap * mpmath.tanh(s / call.softcap)
                if call.alibi_slopes is not None:
                    s += mpmath.mpf(float(call.alibi_slopes[h])) * (j - (n - 1))
                hidden = call.sliding_window is not None and j < n - call.sliding_window
                weights.append(mpmath.mpf(0) if hidden else mpmath.exp(s))
                total += weights[-1]
            if call.sinks is not None:
                total += mpmath.exp(mpmath.mpf(float(call.sinks[h])))
            for i in range(call.shape.v_size):
                column = [mpmath.mpf(x) for x in call.v[0, :n, h // r, i].tolist()]
                out[0, 0, h, i] = float(mpmath.fdot(weights, column) / total)
            lse[0, 0, h] = float(mpmath.log(total))
    return out, lse


@given(sizes=sizes(), family=st.sampled_from(sorted(FAMILIES)), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_streaming_in_blocks_changes_nothing(sizes: InputSizes, family: str, seed: int) -> None:
    from verify.kernels.budget import bound as module

    call = draw(family, sizes, seed)
    arithmetic = Arithmetic(cuts_at=lambda n: (0, n))
    whole = error_budget(call, arithmetic)
    kept = module._LOGITS_AT_ONCE, module._KEYS_AT_ONCE
    try:
        module._LOGITS_AT_ONCE, module._KEYS_AT_ONCE = 64, 16
        blocks = error_budget(call, arithmetic)
    finally:
        module._LOGITS_AT_ONCE, module._KEYS_AT_ONCE = kept
    for name in ("out", "bound", "lse_bound", "size", "quadrature", "expected"):
        a, b = getattr(whole, name), getattr(blocks, name)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-30, msg=lambda m, name=name: f"{name}: {m}")
    assert math.isfinite(float(whole.bound.max()))
