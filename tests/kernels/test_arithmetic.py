"""The arithmetic of a call: the plan that really runs, its deepest sums, and rows that share a tile."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import error_budget
from verify.kernels.budget.sums import _step
from verify.kernels.cache_types import parse_cache
from verify.kernels.call import Call, Result, checked_call
from verify.kernels.eager import EagerKernel
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.flash.tiles import Tiles
from verify.kernels.judging.detectors import measure
from verify.kernels.judging.figures import relative_error
from verify.kernels.numbers import U_F32_TENSOR_CORE
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.policy import policy_named
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.registry import build_kernel
from verify.kernels.tensor_parallel import TensorParallelKernel
from verify.kernels.trace import LaunchTrace


def call_of(rows: list[int], heads: int = 12, kv_heads: int = 1, size: int = 16, **more: object) -> Call:
    generator = torch.Generator().manual_seed(3)
    keys = max(rows)
    q = torch.randn(1, len(rows), heads, size, generator=generator).half()
    k, v = (torch.randn(1, keys, kv_heads, size, generator=generator).half() for _ in range(2))
    kv_len = torch.tensor([rows], dtype=torch.int32)
    return checked_call(q, k, v, kv_len=kv_len, scale=0.25, **more)  # type: ignore[arg-type]


def ran(result: Result, n_kv: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ((_, signature),) = LaunchTrace([result.launched]).at(n_kv)
    return signature.head_groups, signature.cuts


def test_a_policy_sees_the_type_of_the_cache() -> None:
    """ik-1183 splits 12 heads over a float16 cache only; else groups are what `before` has."""
    plan = Plan(policy=policy_named("ik-1183").with_threshold(0))
    for cache, groups in (("f16", (8, 4)), ("q8_0", (4, 4, 4))):
        kernel = EagerKernel("x", TileOptions(plan=plan), parse_cache(cache))
        assert ran(kernel.run(call_of([64], size=32)), 64)[0] == groups


def test_the_plan_of_the_call_is_what_its_arithmetic_counts() -> None:
    """Sinks change a policy's groups, and with them the parts of kv=auto; a call may bring its own plan."""
    plan = Plan(policy=policy_named("ik-1183").with_threshold(0), kv=KVCuts("auto"), block=16, sms=8)
    call = call_of([1024])
    with_sinks = replace(call, sinks=torch.zeros(12))
    parts = {}
    for name, each in (
        ("plain", call),
        ("sinks", with_sinks),
        ("own", replace(call, plan=Plan(kv=KVCuts("parts", 7)))),
    ):
        kernel = EagerKernel("x", TileOptions(plan=plan))
        parts[name] = len(ran(kernel.run(each), 1024)[1]) - 1
        assert kernel.arithmetic_of(each).depths(1024).parts == parts[name], name
    assert len(set(parts.values())) == 3


@pytest.mark.parametrize("spread", [[600, 100], [3000, 100, 7]])
def test_rows_of_a_prefill_tile_have_the_cuts_of_the_longest(spread: list[int]) -> None:
    kernel = build_kernel("eager:kv=4")
    assert isinstance(kernel, EagerKernel)
    call = call_of(spread, path="prefill")
    result = kernel.run(call)
    arithmetic = kernel.arithmetic_of(call)
    for n_kv in spread:
        _, cuts = ran(result, n_kv)
        visible = [min(b, n_kv) - a for a, b in pairwise(cuts) if a < n_kv]
        depths = arithmetic.depths(n_kv)
        assert depths.parts >= len(cuts) - 1
        assert depths.longest >= max(visible)
        assert depths.tiles >= -(-max(visible) // 64)


def test_an_accumulator_that_runs_on_is_rounded_at_every_instruction() -> None:
    one_part = Arithmetic(u=U_F32_TENSOR_CORE, block=64, cuts_at=lambda n: (0, n))
    for n_kv in (64, 8192, 131_072):
        apart, on = one_part.depths(n_kv), replace(one_part, chained=2).depths(n_kv)
        assert on.d_l == apart.d_l == apart.d_n
        # Two roundings for each 16 keys, and a rescale a tile.
        assert on.d_n == max(apart.d_n, n_kv // 8 + n_kv // 64 + 1)


def test_a_denominator_of_tiles_of_any_size_is_as_deep_as_one_tile_of_all_keys() -> None:
    known = Arithmetic(block=16, cuts_at=lambda n: (0, n))
    for n_kv in (16, 700, 8192):
        tiles, keys = known.depths(n_kv), replace(known, l_in_tiles=False).depths(n_kv)
        assert keys.d_n == tiles.d_n == tiles.d_l and keys.d_l == max(tiles.d_l, n_kv + 2)


def test_flash_is_charged_for_what_its_call_runs_on() -> None:
    """The type of the inputs, and the tile of this call, whatever ran before."""
    options = TileOptions(plan=Plan())
    kernel = FlashKernel("flash", options)
    call = call_of([4096], size=64)
    f16 = kernel.arithmetic_of(call)
    wide = kernel.arithmetic_of(replace(call, **{name: getattr(call, name).float() for name in "qkv"}))
    assert wide.depths(4096).d_n > 4096 > f16.depths(4096).d_n > 4096 // 16
    again = kernel.arithmetic_of(call)
    assert (again.block, again.depths(4096)) == (f16.block, f16.depths(4096))
    assert FlashKernel("flash", options, tiles=Tiles(16, 16, 4, 2)).arithmetic_of(call).block == 16


def test_tensor_parallel_asks_for_the_arithmetic_of_the_call() -> None:
    """A kernel of another library computes in its inputs' type, on each GPU too."""
    inner = build_kernel("sdpa:math")
    kernel = TensorParallelKernel("sdpa:math", inner, 2)
    call = call_of([64], heads=6, kv_heads=3)
    wide = replace(call, **{name: getattr(call, name).bfloat16() for name in "qkv"})
    assert kernel.arithmetic_of(wide).p == inner.arithmetic_of(wide).p != inner.arithmetic_of(call).p


def test_a_sink_of_minus_infinity_is_no_key() -> None:
    call = replace(call_of([40, 7], heads=4, kv_heads=2), sinks=torch.tensor([0.5, -math.inf, 1.0, 2.0]))
    kernel = build_kernel("eager:block=16")
    found = error_budget(call, kernel.arithmetic_of(call))
    result = kernel.run(call)
    assert torch.isfinite(found.bound).all()
    assert not found.vacuous.any()
    assert ((result.out - found.out).abs() <= found.bound).all()
    assert ((result.lse - found.lse).abs() <= found.lse_bound).all()


def test_a_key_that_a_row_does_not_see_says_nothing_of_it() -> None:
    """However large its logit is for that row."""
    call = call_of([1, 2], heads=2, kv_heads=1)
    call.q[0, 0], call.k[0, 0], call.k[0, 1] = 6e4, 1e-3, 6e4
    found = error_budget(call, build_kernel("eager").arithmetic_of(call))
    assert torch.isfinite(found.lse_bound[0, 0]).all()
    assert not found.vacuous[0, 0].any()


def test_the_spacing_at_zero_is_the_smallest_subnormal() -> None:
    x = torch.tensor([0.0, 1.0, 1.5, 2.0**-20, -4.0], dtype=torch.float64)
    due = torch.tensor([2.0**-24, 2.0**-10, 2.0**-10, 2.0**-24, 2.0**-8], dtype=torch.float64)
    assert torch.equal(_step(x, "f16"), due)
    assert float(_step(x[:1], "bf16")) == 2.0**-133


def test_results_below_float32_are_not_judged_by_their_digits() -> None:
    """Beside a sink that has all the weight, even exact attention in float32 is subnormal."""
    call = replace(call_of([3], heads=2, kv_heads=1), sinks=torch.tensor([101.5, 101.5]))
    kernel = build_kernel("eager")
    budget = error_budget(call, kernel.arithmetic_of(call))
    result = kernel.run(call)
    assert 0 < budget.size.max() < 2.0**-120
    # The nearest float32 numbers are farther apart than an eighth.
    assert ((result.out - budget.out).abs() > budget.size / 100).any()
    assert measure(call, result, kernel.arithmetic_of(call), distinct=True).relative == 0
    assert float(relative_error(torch.ones(1, 4), 2 * torch.ones(1, 4), torch.zeros(1, 4))) == 0.5


def test_weights_that_underflow_beside_a_key_of_value_0_are_expected_to() -> None:
    """P of the other keys is subnormal in float16: the result is off by a tenth of itself, and right."""
    call = call_of([2], heads=1, kv_heads=1)
    call.q[:], call.k[0, :, 0] = 0.0, 0.0
    call.q[..., 0], call.k[0, 0, 0, 0], call.v[0, 0] = 8.0, 8.0, 0.0
    kernel = build_kernel("eager")
    budget = error_budget(call, kernel.arithmetic_of(call))
    error = kernel.run(call).out - budget.out
    assert budget.vacuous.all()
    assert error.norm() > budget.size.norm() / 100
    assert float(relative_error(error, budget.size, budget.expected)) == 0
