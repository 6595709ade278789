from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.arithmetic import Arithmetic, loosest
from kernels.budget import error_budget
from kernels.budget_sums import gamma
from kernels.registry import build_kernel
from support.problems import problem


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
