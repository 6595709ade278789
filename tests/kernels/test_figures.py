"""Figures of an error: by hand on four rows, and one value whoever reduces them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from verify.arms.own_error import _all_rows, _row_sums, _some_rows
from verify.kernels.budget.arithmetic import Arithmetic, loosest
from verify.kernels.budget.bound import Budget, error_budget
from verify.kernels.call import AttentionOutput
from verify.kernels.heads import Heads
from verify.kernels.judging.detectors import findings, measure
from verify.kernels.judging.families import draw
from verify.kernels.judging.figures import (
    budget_fault,
    gain_fault,
    pooled_gain,
    pooled_rms,
    rms_fault,
    row_figures,
)
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel

# Rows of two columns: plain, vacuous, of zeros (an empty row), so small that no gain can be told.
OUT = [[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [1e-9, 0.0]]
BOUND = [[0.5, 0.1], [0.5, 0.1], [0.0, 0.0], [1e-9, 1e-9]]
SIZE = [[6.0, 8.0], [6.0, 8.0], [0.0, 0.0], [1e-9, 0.0]]
EXPECTED = [[0.1, 0.2], [0.1, 0.2], [0.0, 0.0], [1e-9, 0.0]]
ERROR = [[0.3, -0.2], [3.0, 4.0], [0.0, 0.0], [2e-9, 0.0]]


def of_rows(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


def by_hand() -> Budget:
    lse = torch.zeros(1, 4, 1, dtype=torch.float64)
    return Budget(
        out=of_rows(OUT),
        lse=lse,
        bound=of_rows(BOUND),
        lse_bound=lse,
        size=of_rows(SIZE),
        vacuous=torch.tensor([False, True, False, False])[None, :, None],
        expected=of_rows(EXPECTED),
        stagnation=torch.zeros(1, 4, 1, 2, dtype=torch.float64),
        quadrature=of_rows(BOUND),
        bias=(bias := torch.tensor([1e-6, 3e-6, 0.0, math.inf], dtype=torch.float64)[None, :, None]),
        falls=2 * bias,
        rises=bias,
    )


def test_rows_by_hand() -> None:
    found = row_figures(of_rows(ERROR), by_hand())
    assert found.ratio.flatten().tolist() == pytest.approx([2.0, 0.0, 0.0, 2.0])
    assert found.relative.flatten().tolist() == pytest.approx([0.0, 0.5, 0.0, 0.0])
    rms = found.rms.flatten().tolist()
    assert rms[0] == pytest.approx(math.sqrt((9 + 1) / 2))
    assert rms[1] == pytest.approx(math.sqrt((900 + 400) / 2))
    # Nothing is expected of an empty row, and of the last one in its first column alone.
    assert math.isnan(rms[2]) and rms[3] == pytest.approx(2.0)
    assert found.gain.flatten().tolist() == pytest.approx([0.1 / 25, 1.0, 0.0, 2.0])
    assert found.power.flatten().tolist() == pytest.approx([25.0, 25.0, 0.0, 1e-18])
    assert found.severity.flatten().tolist() == pytest.approx([2.0, 4.0, 0.0, 2.0])


def test_rows_together() -> None:
    found = row_figures(of_rows(ERROR), by_hand())
    used = torch.isfinite(found.bias)
    gain = pooled_gain(found.gain, found.power * used, (0, 1, 2))
    assert float(gain) == pytest.approx((0.3 * 3 - 0.2 * 4 + 9 + 16) / 50)
    # The bias of a row of which no gain can be told is left out.
    assert float(pooled_gain(found.bias, found.power, (0, 1, 2))) == pytest.approx(2e-6)
    assert float(pooled_rms(found.rms, (0, 1, 2))) == pytest.approx(math.sqrt((5 + 650 + 4) / 3))
    assert math.isnan(float(pooled_rms(found.rms[:, 2:3], (0, 1, 2))))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_counts_once(bad: float) -> None:
    error = of_rows(ERROR)
    error[0, 0, 0, 0] = bad
    found = row_figures(error, by_hand())
    assert found.nonfinite.flatten().tolist() == [1, 0, 0, 0]
    assert found.ratio.flatten()[0] == pytest.approx(2.0)  # the other column's
    assert found.severity.flatten()[0] == math.inf
    assert torch.isfinite(found.gain).all()


def test_everyone_has_the_same_gain_and_rms() -> None:
    """The detectors of one call, and the evidence in place: one head, the same rows, the same figures."""
    call = draw(
        "rising", InputSizes(n_kv=(200, 130, 77), heads=Heads.grouped(kv=1, ratio=1, k_size=64, v_size=64)), 3
    )
    kernel = build_kernel("eager:kv=2")
    result, arithmetic = kernel.run(call), kernel.arithmetic_of(call)
    budget = error_budget(call, arithmetic)
    error = result.out.double() - budget.out
    of_call = measure(call, result, arithmetic, distinct=True)
    in_place = _all_rows(_row_sums(error, budget.out, budget.out.norm(dim=-1)), call.kv_len[0])
    _some_rows(in_place, error, budget, call.kv_len[0], 3)
    assert float(in_place["gain"]) == pytest.approx(of_call.gain, rel=1e-9)
    assert float(in_place["rms_ratio"]) == pytest.approx(of_call.rms, rel=1e-9)
    assert float(in_place["max_budget_ratio"]) == pytest.approx(of_call.budget, rel=1e-9)


def test_a_gain_does_not_depend_on_the_arithmetic_that_is_assumed() -> None:
    call = draw("gaps", InputSizes(n_kv=(200, 130, 1)), 3)
    kernel = build_kernel("eager")
    result = kernel.run(call)
    result = AttentionOutput(result.out * (1 + 1e-4), result.lse)
    narrow, wide = (
        measure(call, result, a, distinct=True).gain
        for a in (kernel.arithmetic_of(call), Arithmetic(p="bf16", out="f16"))
    )
    assert narrow == pytest.approx(wide, rel=1e-9)
    assert narrow == pytest.approx(1e-4, rel=0.2)


def test_a_bias_that_an_assumed_arithmetic_can_make_is_said_and_is_no_fault() -> None:
    """As torch's flash attention on a CPU: 1.3e-5 too small, in float16."""
    call = draw("gaussian", InputSizes(n_kv=(1024,) * 16), 1)
    kernel = build_kernel("eager:p=f32")
    result = kernel.run(call)
    small = AttentionOutput(result.out * (1 - 1.5e-4), result.lse)
    stated = findings(measure(call, small, kernel.arithmetic_of(call), distinct=True))
    assert "gain" in {f.detector for f in stated}
    assumed = replace(loosest("f16", acc="f32"), u_part=0.0, u_q=0.0)
    (said,) = findings(measure(call, small, assumed, distinct=True))
    assert said.detector == "bias"
    assert "biased by -0.00015, below half a step of its result, 0.00024: no fault" in said.said
    # Nothing that goes one way makes results larger where no key weighs much of the sum.
    call = draw("one-sign", InputSizes(n_kv=(1024,) * 16), 1)
    result = kernel.run(call)
    for factor, said_of in ((1 + 3e-4, "gain"), (1 - 3e-4, "bias")):
        scaled = AttentionOutput(result.out * factor, result.lse)
        found = {f.detector for f in findings(measure(call, scaled, assumed, distinct=True))}
        assert said_of in found and not {"gain", "bias"} - {said_of} & found


def test_sentences() -> None:
    assert budget_fault(0, 1.0, 0.125) is None
    assert budget_fault(2, 9.0, 0.0, " at x") == "NaN or Inf at x"
    assert budget_fault(2, 9.0, 0.0) == "2 elements are NaN or Inf"
    assert budget_fault(0, 9.0, 0.5, " at x") == "error is 9 times its rounding budget at x"
    assert "50.0% of sum p|v| at x" in (budget_fault(0, 0.0, 0.5, " at x") or "")
    assert rms_fault(1.0, 1.0) is None and rms_fault(math.nan, 1.0) is None
    assert gain_fault(1e-5, 1e-5) is None and gain_fault(math.nan, 1e-5) is None
    assert "every result is off by a common factor of 1 -0.02" in (gain_fault(-0.02, 1e-5, 0.02) or "")
    assert "on average by a factor" in (gain_fault(-0.02, 1e-5, 0.1) or "")
