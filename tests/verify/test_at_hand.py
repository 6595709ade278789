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
    """The claim about the smallest fault is held to: a key twice as heavy is seen, at every third key."""
    q, k, v = tensors(rows=1)
    out, _ = verify.exact_attention(q, k, v)
    said = verify.assert_attention(q, k, v, out.half())
    weight = float(said.split("more than ")[1].split()[0])
    s = torch.einsum("bthd,bshd->bths", q.double(), k.double().repeat_interleave(2, 2)) / math.sqrt(32)
    seen = 0
    for key in range(2, 90, 3):
        keep = torch.arange(90) != key
        wrong = by_hand(q, k, v, keep)
        if float(s.softmax(-1)[..., key].max()) < 2 * weight:
            continue
        seen += 1
        with pytest.raises(verify.AttentionMismatch, match=f"as if key {key} were not seen"):
            verify.assert_attention(q, k, v, wrong.half())
    assert seen > 6


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


def pages_of(x: torch.Tensor, page: int = 16) -> torch.Tensor:
    """[B, 90, H, D] as 6 pages a sequence, the last first; what lies behind the last key is NaN."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 96 - x.shape[1]), value=math.nan)
    return padded.unflatten(1, (6, page)).flip(1).flatten(0, 1)


TABLE = torch.tensor([[5, 4, 3, 2, 1, 0], [11, 10, 9, 8, 7, 6]], dtype=torch.int32)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_keys_in_pages(layout: Any) -> None:
    q, k, v = tensors()
    due = verify.exact_attention(q, k, v, causal=True)
    pages = [pages_of(x) for x in (k, v)]
    given = [q, *pages] if layout == "bshd" else [x.transpose(1, 2) for x in (q, *pages)]
    form: Any = {"layout": layout, "block_table": TABLE, "kv_len": [90, 90], "causal": True}
    found = verify.exact_attention(*given, **form)
    out = found.out if layout == "bshd" else found.out.transpose(1, 2)
    assert torch.allclose(out, due.out, atol=1e-12)
    bound = verify.budget(*given, out_dtype=torch.float16, **form).bound
    assert ((found.out.half().double() - found.out).abs() <= bound).all()
    said = verify.assert_attention(*given, found.out.half(), **form)
    assert "would have seen a key that is lost" in said
    shorter = verify.exact_attention(q, k, v, kv_len=torch.tensor([[87, 88, 89]] * 2)).out
    wrong = shorter if layout == "bshd" else shorter.transpose(1, 2)
    with pytest.raises(verify.AttentionMismatch, match=r"as if key 8[789] were not seen"):
        verify.assert_attention(*given, wrong, **form)


def test_packed_tokens() -> None:
    """Three sequences after one another, their keys packed too, or in rows of their own."""
    tokens, counts = (2, 1, 3), (40, 7, 33)
    q = torch.randn(sum(tokens), 4, 32, generator=G).half()
    k, v = (torch.randn(sum(counts), 2, 32, generator=G).half() for _ in range(2))
    starts, starts_k = (torch.tensor([0, *torch.tensor(x).cumsum(0)]).int() for x in (tokens, counts))
    form: Any = {"layout": "thd", "cu_seqlens": starts, "cu_seqlens_k": starts_k, "causal": True}
    found = verify.exact_attention(q, k, v, **form)
    for b in range(3):
        rows, keys = slice(starts[b], starts[b + 1]), slice(starts_k[b], starts_k[b + 1])
        due = verify.exact_attention(q[rows], k[keys], v[keys], causal=True, layout="thd")
        assert torch.allclose(found.out[rows], due.out, atol=1e-12)
        assert torch.allclose(found.lse[rows], due.lse, atol=1e-12)
    verify.assert_attention(q, k, v, found.out.half(), lse=found.lse, **form)
    crossed = verify.exact_attention(q, k.roll(1, 0), v.roll(1, 0), **form).out
    with pytest.raises(verify.AttentionMismatch, match="sequence 0, row"):
        verify.assert_attention(q, k, v, crossed, **form)
    held = torch.zeros(3, 40, 2, 32, dtype=torch.float16)
    for b, n in enumerate(counts):
        held[b, :n] = k[starts_k[b] : starts_k[b] + n]
    form = {"layout": "thd", "cu_seqlens": starts, "kv_len": torch.tensor(counts)}
    every = verify.exact_attention(q, held, held, **form)
    own = verify.exact_attention(q[2:3], k[40:47], k[40:47], layout="thd")
    assert torch.allclose(every.out[2:3], own.out, atol=1e-12)


def test_masks_and_lists_of_keys() -> None:
    q, k, v = tensors()
    seen = torch.rand(1, 1, 3, 90, generator=G) < 0.5
    due = by_hand(q, k, v, seen[0].transpose(0, 1))
    assert torch.allclose(verify.exact_attention(q, k, v, mask=seen).out, due, atol=1e-12)
    added = torch.zeros(1, 1, 3, 90).masked_fill(~seen, -math.inf)
    assert torch.allclose(verify.exact_attention(q, k, v, mask=added).out, due, atol=1e-12)
    keys = torch.where(seen[0, 0], torch.arange(90), -1).int().expand(2, -1, -1)
    assert torch.allclose(verify.exact_attention(q, k, v, keys=keys).out, due, atol=1e-12)
    every = verify.exact_attention(q, k, v).out
    for form in ({"mask": seen}, {"keys": keys}):
        said = verify.assert_attention(q, k, v, due.half(), **form)
        assert "would have seen a key" in said
        with pytest.raises(verify.AttentionMismatch, match="times its budget"):
            verify.assert_attention(q, k, v, every, **form)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"blok_table": TABLE}, "blok_table: no such keyword, did you mean 'block_table'"),
        ({"block_table": TABLE}, "kv_len: expected how many keys"),
        ({"block_table": TABLE, "kv_len": [[1, 2], [3, 4]], "causal": True}, "beside causal=True"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "expected layout='thd'"),
        ({"cu_seqlens_k": torch.tensor([0, 3]), "layout": "thd"}, "cu_seqlens_k: expected cu_seqlens"),
        ({"mask": torch.zeros(2, 1, 3, 89)}, "mask: expected shape"),
        ({"keys": torch.full((2, 3, 4), 90)}, "keys: 90 at [0, 0, 0]"),
    ],
)
def test_forms_that_do_not_fit_are_one_line(form: Any, said: str) -> None:
    with pytest.raises(verify.UsageError) as caught:
        verify.exact_attention(*tensors(), **form)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_packed_tokens_that_do_not_fit() -> None:
    q, k, v = (x[0] for x in tensors())
    for starts, starts_k, said in (
        ([0, 2], [0, 90], "cu_seqlens: expected to rise from 0 to the 3 tokens"),
        ([0, 3], [0, 50, 90], "cu_seqlens_k: 2 sequences, expected the 1"),
    ):
        form: Any = {"cu_seqlens": torch.tensor(starts), "cu_seqlens_k": torch.tensor(starts_k)}
        with pytest.raises(verify.UsageError, match=said):
            verify.exact_attention(q, k, v, layout="thd", **form)
