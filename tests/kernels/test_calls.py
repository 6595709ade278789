"""Calls as engines make them: each form against the formula in Python floats, and what does not fit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from verify.kernels.budget.bound import error_budget
from verify.kernels.call import Call, checked_call
from verify.kernels.errors import KernelFailure
from verify.kernels.exact import ExactKernel, exact_attention, reference_attention
from verify.kernels.judging.detectors import measure
from verify.kernels.registry import build_kernel

PAGE, PAGES = 4, 60
HEADS, KV_HEADS, SIZE = 6, 2, 8
# Sequences of unlike length, and tokens of each.
LENGTHS, TOKENS = (41, 0, 19), (3, 2, 1)
EVERYTHING = ("pages", "packed", "mask", "list", "options")


def some(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everything_call(*forms: str, dtype: torch.dtype = torch.float32, path: str = "several") -> Call:
    """Three sequences in the forms that are named; what nobody may read is NaN."""
    width = max(TOKENS)
    longest = max(LENGTHS)
    kv_len = torch.zeros(len(LENGTHS), width, dtype=torch.int32)
    for b, (n, tokens) in enumerate(zip(LENGTHS, TOKENS, strict=True)):
        for t in range(tokens):
            kv_len[b, t] = max(n - tokens + 1 + t, 0) if n else 0
    q = some(len(LENGTHS), width, HEADS, SIZE, seed=1)
    k, v = (some(len(LENGTHS), longest, KV_HEADS, SIZE, seed=s) for s in (2, 3))
    given: dict[str, Any] = {}
    keys = longest
    if "pages" in forms:
        table = torch.randperm(PAGES, generator=torch.Generator().manual_seed(4))[:36].view(3, 12).int()
        pools = [torch.full((PAGES, PAGE, KV_HEADS, SIZE), math.nan) for _ in range(2)]
        for pool, x in zip(pools, (k, v), strict=True):
            for b, n in enumerate(LENGTHS):
                for j in range(n):
                    pool[table[b, j // PAGE], j % PAGE] = x[b, j]
        table[0, 11], table[1], table[2, 5:] = -1, 2**31 - 1, 39
        (k, v), keys = pools, 48
        given["block_table"] = table
    if "mask" in forms:
        # A number a head, row and key, some hidden.
        mask = some(len(LENGTHS), HEADS, width, keys, seed=5)
        mask[some(*mask.shape, seed=6) > 1] = -math.inf
        given["mask"] = mask
    if "list" in forms:
        listed = torch.full((len(LENGTHS), width, 30), -1, dtype=torch.int32)
        for b in range(len(LENGTHS)):
            for t in range(width):
                order = torch.randperm(int(kv_len[b, t]), generator=torch.Generator().manual_seed(b + 7 * t))
                listed[b, t, 1 : 1 + len(order[:25])] = order[:25].int()
        given["keys"] = listed
    if "options" in forms:
        given |= {"sliding_window": 30, "softcap": 2.0, "sinks": some(HEADS, seed=7)}
        given["alibi_slopes"] = some(HEADS, seed=8).abs()
    if "packed" in forms:
        own = torch.tensor([t < TOKENS[b] for b in range(3) for t in range(width)])
        q, kv_len = q.flatten(0, 1)[own], kv_len.flatten()[own]
        given["cu_seqlens"] = torch.tensor([0, 3, 5, 6], dtype=torch.int32)
        if "mask" in given:
            given["mask"] = given["mask"].transpose(1, 2).flatten(0, 1)[own].transpose(0, 1)[None]
        if "keys" in given:
            given["keys"] = given["keys"].flatten(0, 1)[own]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return checked_call(q, k, v, kv_len=kv_len, scale=0.4, path=path, **given)


def by_hand(c: Call, place: tuple[int, int], h: int) -> tuple[list[float], float]:
    """One row and head of a call by the formula, in Python floats."""
    row, t = place
    b = row
    if c.cu_seqlens is not None:
        b = sum(int(start) <= t for start in c.cu_seqlens[1:])
    n, kv = int(c.kv_len[row, t]), h // (HEADS // KV_HEADS)
    seen = range(n) if c.keys is None else [int(j) for j in c.keys[row, t] if j >= 0]
    logits, values = [], []
    for j in seen:
        if j < n - (c.sliding_window or n):
            continue
        where = (b, j) if c.block_table is None else (int(c.block_table[b, j // PAGE]), j % PAGE)
        s = c.scale * math.fsum((c.q[row, t, h].double() * c.k[where][kv].double()).tolist())
        if c.softcap:
            s = c.softcap * math.tanh(s / c.softcap)
        if c.alibi_slopes is not None:
            s += float(c.alibi_slopes[h]) * (j - (n - 1))
        if c.mask is not None:
            s += float(c.mask[row, h, t, j])
        logits.append(s)
        values.append(c.v[where][kv].double().tolist())
    sink = [float(c.sinks[h])] if c.sinks is not None else []
    total = math.fsum(math.exp(s) for s in logits + sink)
    if not total:
        return [0.0] * SIZE, -math.inf
    weights = [math.exp(s) / total for s in logits]
    out = [math.fsum(w * v[d] for w, v in zip(weights, values, strict=True)) for d in range(SIZE)]
    return out, math.log(total)


@pytest.mark.parametrize("path", ["decode", "several", "prefill"])
@pytest.mark.parametrize(
    "forms",
    [(), *((form,) for form in EVERYTHING), EVERYTHING, EVERYTHING[:3], EVERYTHING[:4]],
    ids=lambda forms: "+".join(forms) or "plain",
)
def test_every_form_follows_the_formula(forms: tuple[str, ...], path: str) -> None:
    call = everything_call(*forms, path=path)
    exact, plain = exact_attention(call), reference_attention(call)
    kernel = build_kernel("eager:kv=2,block=16,p=f32,heads=2+1")
    result, budget = kernel.run(call), error_budget(call, kernel.arithmetic_of(call))
    for b in range(call.q.shape[0]):
        for t in range(call.q.shape[1]):
            for h in (1, 4):
                out, lse = by_hand(call, (b, t), h)
                for found in (exact, plain, budget):
                    assert found.out[b, t, h].tolist() == pytest.approx(out, rel=1e-11, abs=1e-13)
                    assert found.lse[b, t, h].item() == pytest.approx(lse, rel=1e-11, abs=1e-13)
    assert ((result.out - budget.out).abs() <= budget.bound).all()
    same = result.lse == budget.lse
    assert (same | ((result.lse - budget.lse).abs() <= budget.lse_bound)).all()
    assert not budget.vacuous.any()
    assert sum(result.launched.rows.values()) == call.kv_len.numel()
    assert measure(call, result, kernel.arithmetic_of(call), distinct=True).nonfinite == 0


def test_v_inside_k_is_v_apart() -> None:
    k = some(2, 9, 1, 24, seed=1)
    q, kv_len = some(2, 3, 4, 24, seed=2), torch.tensor([[7, 8, 9], [0, 1, 2]], dtype=torch.int32)
    for columns in ((0, 16), (8, 24)):
        inside = checked_call(q, k, v_in_k=columns, kv_len=kv_len, scale=0.2)
        assert inside.v_in_k == columns
        apart = checked_call(q, k, k[..., slice(*columns)].clone(), kv_len=kv_len, scale=0.2)
        assert apart.v_in_k is None
        for kernel in (build_kernel("eager:kv=2"), ExactKernel("exact")):
            assert torch.equal(kernel.run(inside).out, kernel.run(apart).out)
    # K alone is no V in it, and neither is another tensor's memory.
    assert checked_call(q, k, k, kv_len=kv_len, scale=0.2).v_in_k is None


def test_what_a_cache_rounds_it_rounds_once_where_v_is_inside_k() -> None:
    k = some(1, 70, 1, 96, seed=1).half()
    kernel = build_kernel("flash:cache=q8_0")
    call = checked_call(
        some(1, 1, 2, 96, seed=2).half(), k, v_in_k=(32, 96), kv_len=torch.tensor([[70]]), scale=0.1
    )
    held = kernel.held(call)
    assert held.v_in_k == (32, 96)
    assert not torch.equal(held.k, k)


def pages_call(**change: Any) -> dict[str, Any]:
    """Two sequences of 5 and 3 keys in pages of 2."""
    kv_len = torch.tensor([[4, 5], [2, 3]], dtype=torch.int32)
    table = torch.tensor([[4, 1, 7], [2, 0, -1]], dtype=torch.int32)
    given = {"q": torch.zeros(2, 2, 4, 8), "k": torch.zeros(9, 2, 2, 8), "v": torch.zeros(9, 2, 2, 8)}
    return given | {"kv_len": kv_len, "scale": 1.0, "block_table": table} | change


TABLE = pages_call()["block_table"]
PACKED = {"q": torch.zeros(4, 4, 8), "kv_len": torch.tensor([4, 5, 2, 3])}
LISTS = torch.tensor([[[0, 3, -1], [4, 1, -1]], [[1, 0, -1], [-1, -1, 2]]])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"block_table": TABLE + 5}, r"block_table: 9 at \[0, 0\] names no page, expected 0 to 8"),
        ({"block_table": -TABLE}, r"block_table: -4 at \[0, 0\] names no page"),
        ({"block_table": TABLE * 0}, "block_table: page 0 is twice in row 0"),
        ({"block_table": TABLE[:, :2]}, r"kv_len: 5 at \[0, 1\] is beyond the table, .* 2 pages of 2 keys"),
        ({"block_table": TABLE[:1]}, "block_table: expected a row for each of 2 sequences, got 1"),
        ({"block_table": TABLE[0]}, r"block_table: expected \[B, pages\] int32, got \[3\]"),
        ({"block_table": TABLE.float()}, "block_table: expected .* int32, got .* torch.float32"),
        ({"k": torch.zeros(9, 0, 2, 8), "v": torch.zeros(9, 0, 2, 8)}, "k: expected pages of at least one"),
        ({"v": torch.zeros(9, 3, 2, 8)}, r"v: expected \[P, page, Hkv\]"),
        ({"mask": torch.ones(2, 4, 2, 5)}, r"mask: expected shape \[2 or 1, 4 or 1, 2, 6\], got"),
        ({"mask": torch.ones(2, 2, 2, 6)}, "mask: expected shape"),
        ({"mask": torch.ones(2, 6)}, "mask: expected shape"),
        ({"mask": torch.ones(2, 1, 2, 6).int()}, "mask: expected bool, or numbers"),
        ({"mask": torch.full((2, 1, 2, 6), math.nan)}, r"mask: nan at \[0, 0, 0, 0\], expected finite"),
        ({"keys": LISTS + 2}, r"keys: 5 at \[0, 0, 1\], expected -1 or one of the row's 4 keys"),
        ({"keys": LISTS - 1}, r"keys: -2 at \[0, 0, 2\], expected -1 or one"),
        ({"keys": LISTS.clamp(min=0)}, r"keys: key 0 is twice in the list at \[0, 0\]"),
        ({"keys": LISTS[0]}, r"keys: expected shape \[2, 2, K\] int32"),
        (PACKED | {"cu_seqlens": torch.tensor([1, 2, 4])}, "cu_seqlens: expected to begin with 0, got 1"),
        (PACKED | {"cu_seqlens": torch.tensor([0, 5, 4])}, r"cu_seqlens: falls from 5 to 4 at \[2\]: rows"),
        (PACKED | {"cu_seqlens": torch.tensor([0, 2, 3])}, "cu_seqlens: ends with 3, expected the 4 tokens"),
        (
            PACKED | {"cu_seqlens": torch.tensor([0, 4])},
            "block_table: expected a row for each of 1 sequences",
        ),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "q, cu_seqlens: expected packed tokens"),
        ({"v": None}, "v: expected values, or v_in_k"),
        ({"v": None, "v_in_k": (4, 9)}, "v_in_k: expected columns within 0 to 8 of K, got 4 to 9"),
        ({"v_in_k": (0, 8)}, "v: given beside v_in_k, and not columns 0 to 8"),
        (
            {"q": torch.zeros(2, 17, 4, 8), "kv_len": torch.ones(2, 17).int(), "path": "several"},
            "q: 17 query tokens of sequence 0, expected at most 16 on path several",
        ),
    ],
)
def test_forms_that_do_not_fit_are_named(change: dict[str, Any], said: str) -> None:
    given = pages_call(**change)
    with pytest.raises(ValueError, match=said):
        checked_call(given.pop("q"), given.pop("k"), given.pop("v"), **given)


def test_what_no_row_needs_may_be_anything() -> None:
    call = pages_call()
    call["block_table"][1, 2] = 2**31 - 1
    call["kv_len"][1] = 0
    call["block_table"][1, :2] = -7
    checked_call(call.pop("q"), call.pop("k"), call.pop("v"), **call)


@pytest.mark.parametrize("forms", [("pages",), ("packed",), ("mask",), ("list",)], ids=lambda f: f[0])
def test_a_kernel_that_has_not_a_form_says_so(forms: tuple[str, ...]) -> None:
    words = {"pages": "takes no pages", "packed": "takes no packed sequences", "mask": "takes no mask"}
    call = everything_call(*forms, dtype=torch.float16, path="decode")
    for kernel in (build_kernel("sdpa:math"), build_kernel("sdpa:flash")):
        with pytest.raises(KernelFailure, match=words.get(forms[0], "takes no list of keys")) as caught:
            kernel.run(call)
        assert caught.value.kind == "unsupported"
        assert "\n" not in str(caught.value)


def test_a_kernel_that_has_no_path_several_says_so() -> None:
    call = everything_call(path="several", dtype=torch.float16)
    for kernel in (build_kernel("sdpa:math"), build_kernel("sdpa:flash")):
        with pytest.raises(KernelFailure, match="has no path several"):
            kernel.run(call)


def test_lengths_do_not_change_what_rows_of_one_tile_are_given() -> None:
    """On the path `several` each row has the plan and the bits that it has alone."""
    kernel = build_kernel("eager:kv=3,block=16")
    g = torch.Generator().manual_seed(3)
    q = torch.randn(1, 5, 6, 32, generator=g).half()
    k, v = (torch.randn(1, 100, 2, 32, generator=g).half() for _ in range(2))
    kv_len = torch.tensor([[62, 63, 64, 65, 66]], dtype=torch.int32)
    together = kernel.attend(q, k, v, kv_len=kv_len, scale=0.2, path="several")
    for t in range(5):
        alone = kernel.attend(q[:, t : t + 1], k, v, kv_len=kv_len[:, t : t + 1], scale=0.2)
        assert torch.equal(alone.out[:, 0], together.out[:, t])
        assert torch.equal(alone.lse[:, 0], together.lse[:, t])
    cuts = {n: signature.cuts for _, n, signature in together.launched.rows}
    assert cuts[64] == (0, 16, 32, 64)
    assert cuts[65] == (0, 16, 48, 65)
