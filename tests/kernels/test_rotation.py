"""The rotation against its matrix, and kernels over rotated, mixed and 8-bit caches within their budgets."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from verify.kernels.budget.bound import Budget, error_budget
from verify.kernels.cache_types import LAW_CACHES, parse_cache
from verify.kernels.call import Call, checked_call
from verify.kernels.eager import EagerKernel
from verify.kernels.exact import exact_attention
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.judging.figures import budget_ratio
from verify.kernels.kernel import Kernel
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.registry import build_kernel
from verify.kernels.rotation import block_mean_square, rotate, roundings, spread_bound
from verify.kernels.stored import store


def matrix(n: int) -> torch.Tensor:
    i = torch.arange(n)
    odd = sum((i[:, None] & i[None, :]) >> bit & 1 for bit in range(n.bit_length())) % 2
    return (1.0 - 2.0 * odd).double() / math.sqrt(n)


def call_of(size: int = 64, v_size: int = 64, keys: int = 130, dtype: torch.dtype = torch.float16) -> Call:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 3, 6, size), (1, keys, 2, size), (1, keys, 2, v_size))
    q, k, v = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    kv_len = torch.tensor([[1, keys // 2, keys]], dtype=torch.int32)
    return checked_call(q, k, v, kv_len=kv_len, scale=size**-0.5)


@pytest.mark.parametrize("block", [2, 32, 64, 128])
def test_rotation_is_sylvesters_matrix_in_blocks(block: int) -> None:
    x = torch.randn(3, 5, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    h = matrix(block)
    due = (x.unflatten(-1, (-1, block)) @ h).flatten(-2)
    assert torch.allclose(rotate(x, block), due, atol=1e-12, rtol=0)
    assert torch.allclose(rotate(rotate(x, block), block), x, atol=1e-12, rtol=0)
    blocks = x.abs().unflatten(-1, (-1, block))
    bound = (blocks @ h.abs()).flatten(-2)
    assert torch.allclose(spread_bound(x.abs(), block), bound)
    assert torch.allclose(block_mean_square(x, block).square(), (blocks.square() @ h.square()).flatten(-2))
    # In float32 each number passes log2 n additions and one product.
    error = (rotate(x.float(), block).double() - rotate(x.float().double(), block)).abs()
    assert bool((error <= roundings(block) * 2.0**-24 * bound * 1.001).all())
    assert rotate(x, 0) is x


def test_rotation_refuses_what_does_not_divide() -> None:
    for block in (3, 512):
        with pytest.raises(ValueError, match=f"a power of two that divides the head size 256, got {block}"):
            rotate(torch.zeros(256), block)


def budget_of(kernel: Kernel, call: Call) -> Budget:
    return error_budget(kernel.held(call), kernel.arithmetic_of(call))


@pytest.mark.parametrize("cache", LAW_CACHES)
def test_kernels_keep_their_budget_over_every_cache(cache: str) -> None:
    for call in (call_of(), call_of(96, 64, dtype=torch.bfloat16)):
        kernel = build_kernel(f"eager:kv=2,cache={cache}")
        result, budget = kernel.run(call), budget_of(kernel, call)
        held = exact_attention(kernel.held(call))
        assert torch.allclose(budget.out, held.out, atol=1e-9) and torch.allclose(
            budget.lse, held.lse, atol=1e-6
        )
        error = result.out.double() - budget.out
        assert float(budget_ratio(error, budget.bound).max()) <= 1
        assert float(budget_ratio(result.lse.double() - budget.lse, budget.lse_bound).max()) <= 1
        assert float(error.norm() / budget.expected.norm()) < 1.3
        given = exact_attention(call).out
        # What the cache loses is far more than the arithmetic, and so told apart from it.
        if (cache, call.q.dtype) != ("bf16", torch.bfloat16):
            assert float((result.out - given).norm()) > 3 * float(error.norm())


def test_the_interpreted_cuda_kernel_reads_rotated_and_mixed_caches() -> None:
    call = call_of(keys=70)
    for cache, ran in (
        ("q4_0+rotate=mainline", "fused"),
        ("q8_0/q4_0", "f16"),
        ("e4m3+scale=head", "fused,reader=wide"),
    ):
        kernel = FlashKernel("flash", TileOptions(), cache=parse_cache(cache))
        result, budget = kernel.run(call), budget_of(kernel, call)
        assert float(budget_ratio(result.out.double() - budget.out, budget.bound).max()) <= 1
        (label,) = {signature.kernel for _, _, signature in result.launched.rows}
        assert label.endswith(f"cache={cache},expand={ran}]")
        assert torch.equal(kernel.ready(call).launch().out, result.out)


def test_p_and_q_of_8_bits_keep_their_budgets_and_are_no_tighter_than_they_are() -> None:
    call = call_of()
    given = exact_attention(call).out
    lost = {}
    for spec in ("eager", "eager:p=e4m3", "eager:p=e5m2", "eager:q=e4m3", "eager:q=e4m3,p=e4m3,cache=e4m3"):
        kernel = build_kernel(spec)
        result, budget = kernel.run(call), budget_of(kernel, call)
        assert float(budget_ratio(result.out.double() - budget.out, budget.bound).max()) <= 1, spec
        lost[spec] = float((result.out - given).norm())
    assert lost["eager"] * 50 < lost["eager:p=e4m3"] < lost["eager:p=e5m2"]
    with pytest.raises(ValueError, match="P of 8 bits is scaled up, and its sums overflow float16"):
        build_kernel("eager:p=e4m3,acc=f16")


def test_a_row_of_small_weights_does_not_vanish_in_e4m3() -> None:
    """Beside a key of weight 1, 4,000 of weight e^-7: below half of e4m3's least number P alone would be 0,
    multiplied by 2^8 it is not. A kernel that forgets the factor is out of its budget."""
    keys, size = 4001, 32
    q = torch.ones(1, 1, 1, size).half()
    k = torch.full((1, keys, 1, size), -7 / size).half()
    k[:, 0] = 0
    v = torch.ones(1, keys, 1, size).half()
    v[:, 0] = -1
    call = checked_call(q, k, v, kv_len=torch.tensor([[keys]], dtype=torch.int32), scale=1.0)
    kernel = build_kernel("eager:p=e4m3")
    budget = budget_of(kernel, call)
    assert float(budget_ratio(kernel.run(call).out.double() - budget.out, budget.bound).max()) <= 1
    vanished = torch.full_like(budget.out, -1.0) / torch.exp(budget.lse)[..., None]
    assert float(budget_ratio(vanished - budget.out, budget.bound).max()) > 5


def test_layers_have_the_cache_that_is_asked_for() -> None:
    kernel = EagerKernel("x", TileOptions(), parse_cache("q4_0@0-1:f16@2-2:q8_0/f16"))
    call = call_of()
    alike = {0: "f16", 1: "f16", 2: "q8_0/f16", 3: "q4_0", None: "q4_0"}
    for layer, cache in alike.items():
        at = replace(call, layer=layer)
        result, alone = kernel.run(at), EagerKernel("y", TileOptions(), parse_cache(cache)).run(call)
        assert torch.equal(result.out, alone.out)
        assert result.launched.rows == alone.launched.rows
        assert (kernel.held(at) is at) == (cache == "f16")


def test_keys_that_no_row_sees_are_no_part_of_a_rotated_cache() -> None:
    call = call_of(keys=40)
    v = call.v.clone()
    v[:, 20:] = 6e4
    short = replace(call, v=v, kv_len=torch.tensor([[1, 10, 20]], dtype=torch.int32))
    kept = store(short, parse_cache("q4_0+rotate=mainline"))
    assert kept.call.v[:, 20:].abs().max() == 0
    found = build_kernel("eager:cache=q4_0+rotate=mainline").run(short)
    assert bool(torch.isfinite(found.out).all())


def test_pages_and_columns_of_keys_are_kept_as_whole_caches_are() -> None:
    """What a paged call holds, gathered, is what the same keys hold in one piece; V in K is K's columns."""
    call, cache = call_of(keys=40), parse_cache("q4_0+rotate=mainline")
    whole = store(call, cache).call
    order = torch.tensor([3, 0, 2])
    paged = {}
    for name in ("k", "v"):
        pages = torch.full((5, 16, *getattr(call, name).shape[2:]), 6e4, dtype=torch.float16)
        padded = torch.nn.functional.pad(getattr(call, name)[0], (0, 0, 0, 0, 0, 8), value=6e4)
        pages[order] = padded.unflatten(0, (3, 16))
        paged[name] = pages
    table = torch.tensor([[3, 0, 2, -1]], dtype=torch.int32)
    found = store(replace(call, **paged, block_table=table), cache).call
    assert bool(torch.isfinite(found.v).all())
    for name in ("k", "v"):
        gathered = getattr(found, name)[order].flatten(0, 1)[:40]
        assert torch.equal(gathered, getattr(whole, name)[0])
    latent = replace(call_of(96, 64, keys=40))
    columns = replace(latent, v=latent.k[..., :64])
    assert columns.v_in_k == (0, 64)
    kept = store(columns, parse_cache("q8_0/q4_0+rotate=32"))
    assert torch.equal(kept.call.v, kept.call.k[..., :64])
    assert torch.equal(
        EagerKernel("x", TileOptions(), parse_cache("q8_0/q4_0+rotate=32")).held(columns).v,
        EagerKernel("x", TileOptions(), parse_cache("q8_0/q4_0+rotate=32")).held(columns).k[..., :64],
    )
