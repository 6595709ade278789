from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.problems import problem
from support.right_kernels import cubic_exponential, exp_by_cubic
from verify.kernels.budget.arithmetic import Arithmetic, loosest
from verify.kernels.budget.bound import error_budget
from verify.kernels.budget.sums import gamma
from verify.kernels.call import checked_call
from verify.kernels.foreign.function_kernel import FunctionKernel
from verify.kernels.heads import Heads
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.numbers import U_F32, U_F32_TENSOR_CORE
from verify.kernels.registry import build_kernel


def largest_ratio(spec: str, sharpness: float, seed: int, rows: int) -> float:
    call = problem(rows=rows, seed=seed, sharpness=sharpness, ratio=2, kv_heads=1, size=16)
    kernel = build_kernel(spec)
    budget = error_budget(call, kernel.arithmetic(call.shape, call.path))
    return float(((kernel.run(call).out - budget.out).abs() / budget.bound).max())


@given(
    spec=st.sampled_from(["eager", "eager:kv=3,block=16", "eager:p=f32", "eager:p=bf16,out=bf16"]),
    sharpness=st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]),
    seed=st.integers(0, 1000),
    rows=st.integers(1, 90),
)
def test_correct_kernels_stay_within_their_budget(spec: str, sharpness: float, seed: int, rows: int) -> None:
    assert largest_ratio(spec, sharpness, seed, rows) <= 1


def test_the_bound_is_not_slack() -> None:
    call = problem(rows=128, size=64)
    kernel = build_kernel("eager")
    budget = error_budget(call, kernel.arithmetic(call.shape, call.path))
    ratio = (kernel.run(call).out - budget.out).abs() / budget.bound
    assert ratio.max() > 0.3


@pytest.mark.parametrize("fault", ["last key dropped", "scale", "neighbour's head", "stray key"])
def test_faults_break_the_budget(fault: str) -> None:
    call = problem(rows=128, size=64)
    kernel = build_kernel("eager")
    budget = error_budget(call, kernel.arithmetic(call.shape, call.path))
    q, k, v, kv_len, scale = call.q, call.k, call.v, call.kv_len, call.scale
    if fault == "last key dropped":
        kv_len = (kv_len - 1).clamp(min=1)
    elif fault == "scale":
        scale *= 1.001
    elif fault == "neighbour's head":
        q = q.roll(1, 2)
    else:
        kv_len = (kv_len + 1).clamp(max=128)
    wrong = kernel.attend(q, k, v, kv_len=kv_len, scale=scale)
    ratio = ((wrong.out - budget.out).abs() / budget.bound).amax((0, 2, 3))
    assert (ratio > 1).float().mean() > 0.5


def test_unknown_accumulators_make_long_rows_vacuous_and_short_ones_not() -> None:
    call = problem(rows=600, ratio=1, kv_heads=1)
    vacuous = error_budget(call, loosest("f16")).vacuous[0, :, 0]
    assert not vacuous[:20].any()
    assert vacuous[500:].all()
    assert not error_budget(call, loosest("f16", acc="f32")).vacuous.any()


def test_a_wider_type_has_a_smaller_bound() -> None:
    call = problem(rows=64)
    bounds = [
        float(error_budget(call, Arithmetic(p=p, cuts_at=lambda n: (0, n))).bound.mean())
        for p in ("f32", "f16", "bf16")
    ]
    assert bounds == sorted(bounds)
    assert bounds[2] > 4 * bounds[1]


def test_gamma_is_infinite_where_it_says_nothing() -> None:
    assert gamma(torch.tensor([1.0, 4096.0], dtype=torch.float64), 2.0**-11).tolist() == [
        2.0**-11 / (1 - 2.0**-11),
        float("inf"),
    ]


def truncate(x: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """x without what lies below `unit`, toward zero."""
    return torch.trunc(x / unit) * unit


def summed_by_a_tensor_core(terms: torch.Tensor) -> torch.Tensor:
    """terms [n, D] added 16 at a time: two bits are kept below the accumulator's last place, then none."""
    total = torch.zeros_like(terms[0])
    for some in terms.split(16):
        largest = torch.maximum(total.abs(), some.abs().amax(0)).clamp(min=2.0**-100)
        unit = torch.exp2(torch.floor(torch.log2(largest)) - 23)
        added = truncate(total, unit / 4) + truncate(some, unit / 4).sum(0)
        last = torch.exp2(torch.floor(torch.log2(added.abs().clamp(min=2.0**-100))) - 23)
        total = truncate(added, last)
    return total


@pytest.mark.parametrize("one_sign", [True, False])
def test_accumulators_that_truncate_lose_what_is_expected_of_them(one_sign: bool) -> None:
    """Flat weights, whose P is exact: all that is lost is lost in the sums."""
    n = 16_384
    generator = torch.Generator().manual_seed(5)
    # As many digits as products of float16 numbers have.
    v = torch.randn(1, n, 1, 64, generator=generator)
    v = v.abs() if one_sign else v
    q, k = torch.zeros(1, 1, 1, 64), torch.zeros_like(v)
    call = checked_call(q, k, v, kv_len=torch.tensor([[n]], dtype=torch.int32), scale=1.0)
    found = summed_by_a_tensor_core(v[0, :, 0].double()) / n
    rms = {}
    for name, u in (("truncates", U_F32_TENSOR_CORE), ("rounds", U_F32)):
        budget = error_budget(call, Arithmetic(p="f32", u=u, cuts_at=lambda n_kv: (0, n_kv)))
        error = found - budget.out[0, 0, 0]
        rms[name] = float((error / budget.expected[0, 0, 0]).square().mean().sqrt())
        assert float((error.abs() / budget.bound[0, 0, 0]).max()) <= (1 if name == "truncates" else 99)
    assert 0.4 < rms["truncates"] < 1.3, rms
    # The model of an accumulator that rounds to nearest does not explain it.
    assert rms["rounds"] > 1.5 * rms["truncates"], rms
    if one_sign:
        assert rms["rounds"] > 10, rms


@pytest.mark.parametrize("gap", [0.02, 0.05, 0.1, 0.6])
def test_what_states_nothing_may_have_an_exponential_by_a_polynomial(gap: float) -> None:
    """Many keys as far below one other: their P are all off one way, by up to 9e-5, and so is the lse."""
    call = problem(rows=200, kv_heads=1, ratio=1)
    q = torch.zeros_like(call.q)
    q[..., 0] = 1.0
    k = torch.zeros_like(call.k)
    k[:, 1:, :, 0] = -gap
    call = replace(call, q=q, k=k, scale=1.0)
    x = (k[..., 0].float() * 1.0)[0, :, 0]
    p = exp_by_cubic(x)
    # Row t sees keys 0 .. t; the largest logit is the first key's.
    total = p.cumsum(0)
    out = (p[:, None] * call.v[0, :, 0].float()).cumsum(0) / total[:, None]
    # All else is as tight as it is for a kernel whose other roundings were read off it.
    read = replace(loosest("f32"), u_q=0.0, u_part=0.0, p_shift=0.0, block=64, cuts_at=lambda n: (0, n))
    budget = error_budget(call, read)
    off = (total.log().double() - budget.lse[0, :, 0]).abs()
    assert float((off / budget.lse_bound[0, :, 0]).max()) <= 1
    assert float(((out.double() - budget.out[0, :, 0]).abs() / budget.bound[0, :, 0]).max()) <= 1
    # It is this that the room is for: without it the same lse is no right kernel's.
    assert float((off / error_budget(call, replace(read, u_exp=0.0)).lse_bound[0, :, 0]).max()) > 1


def test_a_polynomial_s_error_counts_in_every_rescale() -> None:
    """In nearly flat rows the maximum grows by next to nothing, and e^-0 is 8.5e-5 below 1 each time."""
    call = draw("tiny", InputSizes(n_kv=(1101,) * 16, heads=Heads(2, 1, 64, 64)), 0)
    kernel = FunctionKernel(cubic_exponential)
    one = Arithmetic(u_exp=8.8e-5, block=2048, cuts_at=lambda n: (0, n))
    off = (kernel.run(call).lse.double() - error_budget(call, one).lse).abs()
    assert bool((off > error_budget(call, one).lse_bound).any())
    assert bool((off <= error_budget(call, replace(one, block=64)).lse_bound).all())
