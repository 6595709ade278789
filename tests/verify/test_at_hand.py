"""Tensors at hand: exact attention in every layout, budgets, merges, and what `assert_attention` says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import verify
from verify.kernels.faults import FAULTS

G = torch.Generator().manual_seed(5)


def tensors(rows: int = 3, keys: int = 90, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.randn(2, n, h, 32, generator=G).to(dtype) for n, h in ((rows, 4), (keys, 2), (keys, 2))
    )


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    k, v = (x.double().repeat_interleave(2, 2) for x in (k, v))
    s = torch.einsum("bthd,bshd->bths", q.double(), k) / math.sqrt(32)
    return torch.einsum("bths,bshd->bthd", s.masked_fill(~seen, -math.inf).softmax(-1), v)


def test_exact_attention_in_every_order_of_dimensions() -> None:
    q, k, v = tensors()
    triangle = torch.arange(90) <= torch.arange(87, 90)[:, None]
    due = by_hand(q, k, v, triangle[:, None])
    out, lse = verify.exact_attention(q, k, v, causal=True)
    assert torch.allclose(out, due, atol=1e-12) and lse.shape == (2, 3, 4)
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    heads_first = verify.exact_attention(*swapped, causal=True, layout="bhsd")
    assert torch.equal(heads_first.out.transpose(1, 2), out)
    assert torch.equal(heads_first.lse.transpose(1, 2), lse)
    packed = verify.exact_attention(q[0], k[0], v[0], causal=True, layout="thd")
    assert torch.allclose(packed.out, out[0], atol=1e-12) and packed.lse.shape == (3, 4)


@pytest.mark.parametrize("kv_len", [50, [50, 50], torch.tensor([[50] * 3] * 2)], ids=["one", "B", "BT"])
def test_lengths_may_be_one_number_or_many(kv_len: Any) -> None:
    q, k, v = tensors()
    out, _ = verify.exact_attention(q, k, v, kv_len=kv_len)
    assert torch.allclose(out, by_hand(q, k, v, torch.arange(90) < 50), atol=1e-12)


def test_a_budget_holds_what_a_right_result_errs_by() -> None:
    q, k, v = tensors()
    b = verify.budget(q, k, v, out_dtype=torch.float16)
    error = (b.out.half().double() - b.out).abs()
    assert bool((error <= b.bound).all()) and not bool(b.vacuous.any())
    tighter = verify.budget(q, k, v, arithmetic=verify.Arithmetic(p="f32"))
    assert bool((tighter.bound < b.bound).all())
    swapped = verify.budget(*(x.transpose(1, 2) for x in (q, k, v)), layout="bhsd", out_dtype=torch.float16)
    assert torch.equal(swapped.bound.transpose(1, 2), b.bound)


@pytest.mark.parametrize("order", ["sequential", "tree"])
@pytest.mark.parametrize("base", [math.e, 2])
def test_merging_parts_is_attention_over_all_keys(order: Any, base: float) -> None:
    q, k, v = tensors()
    parts = []
    for a, b in ((0, 30), (30, 31), (31, 90)):
        out, lse = verify.exact_attention(q, k[:, a:b], v[:, a:b])
        parts.append((out, lse / math.log(2) if base == 2 else lse))
    nothing = (torch.zeros_like(parts[0][0]), torch.full_like(parts[0][1], -math.inf))
    out, lse = verify.merge(*parts, nothing, base=base, order=order)
    due = verify.exact_attention(q, k, v)
    assert torch.allclose(out, due.out, atol=1e-12)
    assert torch.allclose(lse * (math.log(2) if base == 2 else 1), due.lse, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_right_results_pass_and_say_what_would_not(dtype: torch.dtype, layout: Any) -> None:
    q, k, v = tensors(dtype=dtype)
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = verify.exact_attention(q, k, v, causal=True, layout=layout)
    said = verify.assert_attention(q, k, v, out.to(dtype), lse=lse.float(), causal=True, layout=layout)
    assert "within its budget" in said and "would have seen a key that is lost with more than" in said


def test_a_lost_key_is_named_if_it_weighs_what_the_sentence_says() -> None:
    """The claim about the smallest fault is held to: a key twice as heavy is seen, at every key."""
    q, k, v = tensors(rows=1)
    out, _ = verify.exact_attention(q, k, v)
    said = verify.assert_attention(q, k, v, out.half())
    weight = float(said.split("more than ")[1].split()[0])
    s = torch.einsum("bthd,bshd->bths", q.double(), k.double().repeat_interleave(2, 2)) / math.sqrt(32)
    seen = 0
    for key in range(90):
        keep = torch.arange(90) != key
        wrong = by_hand(q, k, v, keep)
        if float(s.softmax(-1)[..., key].max()) < 2 * weight:
            continue
        seen += 1
        with pytest.raises(verify.AttentionMismatch, match=f"as if key {key} were not seen"):
            verify.assert_attention(q, k, v, wrong.half())
    assert seen > 20


def test_a_mismatch_names_row_head_element_and_ratio() -> None:
    q, k, v = tensors()
    out = verify.exact_attention(q, k, v, causal=True).out
    out[1, 2, 3, 7] += 0.5
    with pytest.raises(AssertionError) as caught:
        verify.assert_attention(q, k, v, out, causal=True)
    said = str(caught.value)
    assert "sequence 1, row 2 (90 keys), head 3, element 7" in said
    assert "times its budget" in said and "heaviest key of that row" in said


@pytest.mark.parametrize("name", ["last key dropped", "key beyond", "wrong KV head", "cut key twice"])
def test_known_faults_do_not_pass(name: str) -> None:
    faults = {fault.name: fault for fault in FAULTS}
    inputs = verify.families.draw("needles", "4/2x64", n_kv=90, rows=8)
    kernel = faults.get(name, FAULTS[0]).build()
    result = kernel.attend(inputs.q, inputs.k, inputs.v, kv_len=inputs.kv_len, scale=inputs.scale)
    with pytest.raises(verify.AttentionMismatch):
        verify.assert_attention(inputs.q, inputs.k, inputs.v, result.out, kv_len=inputs.kv_len)


def test_sums_in_float16_are_allowed_where_that_is_said() -> None:
    q, k, v = tensors(rows=1, keys=64)
    exact = verify.exact_attention(q, k, v).out
    out = exact + 6e-3
    with pytest.raises(verify.AttentionMismatch, match="if it sums in float16, allows this much"):
        verify.assert_attention(q, k, v, out, distinct=False)
    verify.assert_attention(q, k, v, out, distinct=False, arithmetic="f16")


def test_a_wrong_lse_and_nan_are_seen() -> None:
    q, k, v = tensors()
    out, lse = verify.exact_attention(q, k, v)
    with pytest.raises(verify.AttentionMismatch, match="lse error"):
        verify.assert_attention(q, k, v, out, lse=lse + 0.01)
    out[0, 0, 0, 0] = math.nan
    with pytest.raises(verify.AttentionMismatch, match="NaN or Inf"):
        verify.assert_attention(q, k, v, out)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda q, k, v: verify.exact_attention(q[0], k, v), "q: expected a tensor of 4 dimensions"),
        (lambda q, k, v: verify.exact_attention(q, k, v, layout="hbsd"), "expected one of bshd"),
        (lambda q, k, v: verify.exact_attention(q, k[:, :2], v[:, :2], causal=True), "3 rows over 2 keys"),
        (lambda q, k, v: verify.exact_attention(q, k, v, causal=True, kv_len=3), "expected one of them"),
        (lambda q, k, v: verify.exact_attention(q, k, v, kv_len=[1, 2, 3]), "kv_len: expected [B, T]"),
        (lambda q, k, v: verify.exact_attention(q, k, v, kv_len=91), "from 0 to S = 90"),
        (lambda q, k, v: verify.exact_attention(q, k, v.float()), "expected one dtype"),
        (lambda q, k, v: verify.assert_attention(q, k, v, q[:, :2]), "out: expected shape [2, 3, 4, 32]"),
        (lambda q, k, v: verify.assert_attention(q, k, v, q, lse=q), "lse: expected shape [2, 3, 4]"),
        (lambda q, k, v: verify.budget(q, k, v, arithmetic="p=f64"), "'p=f64'"),
        (lambda q, k, v: verify.merge(), "at least one part"),
        (lambda q, k, v: verify.merge((q, k)), "part 0"),
        (lambda q, k, v: verify.merge((q, q[..., 0]), base=10), "base=10"),
    ],
)
def test_what_does_not_fit_is_one_line(call: Any, said: str) -> None:
    with pytest.raises(verify.UsageError) as caught:
        call(*tensors())
    assert said in str(caught.value) and "\n" not in str(caught.value)
