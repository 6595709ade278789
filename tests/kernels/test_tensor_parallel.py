"""A kernel called once a GPU: which heads each has, and that every one follows the plan of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verify.kernels.budget.bound import error_budget
from verify.kernels.call import Call, checked_call
from verify.kernels.judging.figures import budget_ratio
from verify.kernels.registry import build_kernel
from verify.kernels.tensor_parallel import TensorParallelKernel, shares
from verify.kernels.trace import LaunchTrace


def call_of(kv_heads: int, ratio: int, n_kv: int, *, sinks: bool = False) -> Call:
    draw = torch.Generator().manual_seed(kv_heads)
    q, k, v = (
        torch.randn(1, rows, heads, 16, generator=draw).half()
        for rows, heads in ((2, kv_heads * ratio), (n_kv, kv_heads), (n_kv, kv_heads))
    )
    kv_len = torch.tensor([[n_kv - 1, n_kv]], dtype=torch.int32)
    per_head = torch.randn(kv_heads * ratio, generator=draw) if sinks else None
    return checked_call(q, k, v, kv_len=kv_len, scale=0.25, sinks=per_head)


def tensor_parallel(spec: str, gpus: int) -> TensorParallelKernel:
    return TensorParallelKernel(spec, build_kernel(spec), gpus)


@pytest.mark.parametrize(
    ("total", "gpus", "unit", "sizes"),
    [
        (8, 4, 1, [2, 2, 2, 2]),
        (8, 3, 1, [2, 3, 3]),
        (3, 2, 1, [1, 2]),
        (1536, 4, 32, [384] * 4),
        (1536, 4, 256, [256, 512, 256, 512]),
        (96, 2, 64, [64, 32]),
        (16, 2, 16, [0, 16]),
    ],
)
def test_shares_of_known_sizes(total: int, gpus: int, unit: int, sizes: list[int]) -> None:
    assert [len(share) for share in shares(total, gpus, unit)] == sizes


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40))
def test_shares_hold_everything_once_in_whole_units_and_are_as_equal_as_those_allow(
    total: int, gpus: int, unit: int
) -> None:
    found = shares(total, gpus, unit)
    assert len(found) == gpus
    assert [i for share in found for i in share] == list(range(total))
    assert all(share.start % unit == 0 or share.start == total for share in found)
    units = [-(-len(share) // unit) for share in found]
    assert max(units) - min(units) <= 1


def test_every_gpu_is_called_on_its_heads_and_has_the_plan_of_its_own() -> None:
    call, spec = call_of(4, 2, 1100, sinks=True), "eager:kv=auto,block=16"
    kernel, alone = tensor_parallel(spec, 2), build_kernel(spec)
    found = kernel.run(call)
    assert call.sinks is not None
    apart = LaunchTrace()
    for gpu in range(2):
        q, kv = slice(4 * gpu, 4 * gpu + 4), slice(2 * gpu, 2 * gpu + 2)
        own = checked_call(
            call.q[:, :, q], call.k[:, :, kv], call.v[:, :, kv],
            kv_len=call.kv_len, scale=call.scale, sinks=call.sinks[q],
        )  # fmt: skip
        expected = alone.run(own)
        apart.count(expected.launched)
        assert torch.equal(found.out[:, :, q], expected.out)
        assert torch.equal(found.lse[:, :, q], expected.lse)
    # Two KV heads leave twice the multiprocessors to each: half of 132 // 2 parts, and not of 132 // 4.
    whole = build_kernel(spec).run(call)
    on_one, on_two = LaunchTrace([whole.launched]), LaunchTrace([found.launched])
    assert {line.parts for line in on_one.coverage()} == {17}
    assert {line.parts for line in on_two.coverage()} == {32}
    assert on_two == apart
    assert on_two.total_rows == 2 * on_one.total_rows
    assert not torch.equal(whole.out, found.out)


def test_gpus_that_share_unequally_show_each_its_plan_and_stay_within_the_budget_of_both() -> None:
    call, spec = call_of(5, 2, 1100), "eager:kv=auto,block=16,acc=f16"
    kernel, inner = tensor_parallel(spec, 2), build_kernel(spec)
    result = kernel.run(call)
    out = result.out
    assert {line.parts for line in LaunchTrace([result.launched]).coverage()} == {32, 132 // 3 // 2}
    arithmetic = kernel.arithmetic(call.shape, call.path)
    each = [
        inner.arithmetic(call.shape._replace(heads=call.shape.heads.with_kv(n)), call.path).depths(1100)
        for n in (2, 3)
    ]
    depths = arithmetic.depths(1100)
    assert each[0].parts != each[1].parts and each[0].d_n != each[1].d_n
    assert depths == tuple(max(pair) for pair in zip(*each, strict=True))
    assert arithmetic.acc == "f16"
    budget = error_budget(call, arithmetic)
    assert budget_ratio(out.double() - budget.out, budget.bound).max() <= 1


def test_fewer_heads_than_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="2 KV heads, expected at least one for each of 3 GPUs"):
        tensor_parallel("eager", 3).run(call_of(2, 2, 32))


def test_what_a_kernel_says_of_itself_is_the_inner_ones() -> None:
    kernel = tensor_parallel("flash:cache=q8_0", 2)
    inner, call = kernel.inner, call_of(2, 2, 64)
    q, k, v = (x.repeat(1, 1, 1, 2) for x in (call.q, call.k, call.v))  # a block of q8_0 is 32 numbers
    call = replace(call, q=q, k=k, v=v)
    assert kernel.notes is inner.notes
    assert str(kernel.cache) == "q8_0"
    assert torch.equal(kernel.held(call).k, inner.held(call).k)
    assert kernel.capabilities() == inner.capabilities()
