"""Detectors: clean kernels pass, each detector sees what the others miss, and says where."""

from __future__ import annotations

import math

import pytest
import torch

from verify.kernels.call import AttentionOutput, Call
from verify.kernels.eager import EagerKernel
from verify.kernels.faults import FAULTS
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.heads import Heads
from verify.kernels.judging.detectors import determinism_finding, findings, measure, trace_finding
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel

LONG = InputSizes(n_kv=(2048,), heads=Heads.grouped(kv=1, ratio=6, k_size=64, v_size=64))


def eager(spec: str) -> EagerKernel:
    kernel = build_kernel(spec)
    assert isinstance(kernel, EagerKernel)
    return kernel


def seen(call: Call, out: torch.Tensor, lse: torch.Tensor | None = None, spec: str = "eager") -> set[str]:
    kernel = eager(spec)
    lse = kernel.run(call).lse if lse is None else lse
    arithmetic = kernel.arithmetic(call.shape, call.path)
    return {f.detector for f in findings(measure(call, AttentionOutput(out, lse), arithmetic, distinct=True))}


def test_a_correct_result_is_not_objected_to() -> None:
    call = draw("gaussian", LONG, 1)
    assert seen(call, eager("eager").run(call).out) == set()


def test_one_wrong_element_is_the_budgets() -> None:
    call = draw("gaussian", LONG, 1)
    out = eager("eager").run(call).out
    out[0, 0, 3, 5] += 0.01
    kernel = eager("eager")
    found = measure(call, AttentionOutput(out, kernel.run(call).lse),
                    kernel.arithmetic(call.shape, call.path), distinct=True)  # fmt: skip
    assert found.worst == (0, 0, 3, 5)
    assert found.budget > 1


def test_a_small_error_of_every_element_is_rms_and_not_the_budgets() -> None:
    call = draw("gaussian", LONG, 1)
    kernel = eager("eager")
    arithmetic = kernel.arithmetic(call.shape, call.path)
    result = kernel.run(call)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(result.out.shape, generator=generator) * 4e-5
    found = measure(call, AttentionOutput(result.out + noise, result.lse), arithmetic, distinct=True)
    assert found.budget < 1
    assert found.rms > 2 * found.rms_limit


def test_a_common_factor_is_gain_and_nothing_else() -> None:
    call = draw("gaussian", InputSizes(n_kv=(257, 200, 130), batch=2), 1)
    out = eager("eager").run(call).out
    assert seen(call, out * (1 + 1e-4)) == {"gain"}


def test_float16_accumulators_stand_out_at_2048_keys() -> None:
    """Told apart by rms, where nobody said that they are float16; and clean where somebody did."""
    call = draw("gaussian", LONG, 1)
    f16, f32 = eager("eager:acc=f16"), eager("eager")
    result = f16.run(call)
    found = measure(call, result, f32.arithmetic(call.shape, call.path), distinct=True)
    assert found.rms > 3 * found.rms_limit
    declared = measure(call, result, f16.arithmetic(call.shape, call.path), distinct=True)
    assert findings(declared) == []
    assert 0.3 < declared.rms < 1.3


@pytest.mark.parametrize("fault", ["wrong by 2 %", "last key dropped"])
def test_long_rows_are_seen_by_rms_though_the_budget_has_lost_its_power(fault: str) -> None:
    """131,072 Gaussian keys, one KV head, a float32 result."""
    call = draw(
        "gaussian",
        InputSizes(n_kv=(131_072,), heads=Heads.grouped(kv=1, ratio=2, k_size=64, v_size=64), spare=0),
        3,
    )
    kernel = eager("eager:block=512,kv=16")
    options = call
    if fault == "last key dropped":
        short = call.kv_len - 1
        options = Call(**{**call.__dict__, "kv_len": short})
    result = kernel.run(options)
    out = result.out * 1.02 if fault == "wrong by 2 %" else result.out
    arithmetic = kernel.arithmetic(call.shape, call.path)
    found = measure(call, AttentionOutput(out, result.lse), arithmetic, distinct=True)
    assert found.rms > found.rms_limit
    clean = measure(call, kernel.run(call), arithmetic, distinct=True)
    assert findings(clean) == []


def test_overflow_to_inf_is_an_objection() -> None:
    call = draw("near-overflow", InputSizes(n_kv=(257,)), 0)
    kernel = eager("eager:acc=f16")
    found = measure(call, kernel.run(call), kernel.arithmetic(call.shape, call.path), distinct=True)
    assert found.nonfinite > 0
    assert findings(found)[0].detector == "budget"


def test_a_wrong_lse_is_seen_though_out_is_right() -> None:
    call = draw("gaussian", LONG, 1)
    result = eager("eager").run(call)
    assert seen(call, result.out, result.lse / math.log(2.0)) == {"lse"}


def test_trace_and_determinism() -> None:
    call = draw("gaussian", InputSizes(n_kv=(257,)), 0)
    race = next(f for f in FAULTS if f.name == "race").build()
    assert determinism_finding(race, call, race.run(call), runs=8) is not None
    never = next(f for f in FAULTS if f.name == "never ran").build()
    assert isinstance(never, TileKernel)
    said = trace_finding(never.run(call).launched, lambda n: never.planned(call.shape, n))
    assert said is not None and "(6,)" in said.said and "(4, 2)" in said.said
    right = TileKernel("right", kv=3, heads=(4, 2))
    assert determinism_finding(right, call, right.run(call)) is None
    assert trace_finding(right.run(call).launched, lambda n: right.planned(call.shape, n)) is None
