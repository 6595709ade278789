from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from support.problems import problem
from verify.kernels import exact
from verify.kernels.call import AttentionOutput, Call, checked_call
from verify.kernels.exact import ExactKernel, _sequences_together, exact_attention, reference_attention


def by_hand(c: Call, b: int, t: int, h: int) -> tuple[list[float], float]:
    """One row and head by the formula, in Python floats."""
    n = int(c.kv_len[b, t])
    kv = h // c.shape.ratio
    first = max(n - (c.sliding_window or n), 0)
    logits = []
    for j in range(first, n):
        s = float(c.scale * (c.q[b, t, h].double() @ c.k[b, j, kv].double()))
        if c.softcap:
            s = c.softcap * math.tanh(s / c.softcap)
        if c.alibi_slopes is not None:
            s += float(c.alibi_slopes[h]) * (j - (n - 1))
        logits.append(s)
    sink = [float(c.sinks[h])] if c.sinks is not None else []
    total = math.fsum(math.exp(s) for s in logits + sink)
    values = c.v[b, first:n, kv].double()
    out = [
        math.fsum(math.exp(s) * float(values[i, d]) for i, s in enumerate(logits)) / total
        for d in range(values.shape[1])
    ]
    return out, math.log(total)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 5},
        {"softcap": 2.0},
        {"sinks": torch.linspace(-1, 2, 6)},
        {"alibi_slopes": torch.linspace(0.1, 0.6, 6)},
    ],
    ids=lambda o: next(iter(o), "plain"),
)
def test_every_option_follows_its_formula(options: dict[str, object]) -> None:
    call = problem(rows=20, size=8, **options)
    result = exact_attention(call)
    for t in (0, 4, 5, 19):
        for h in range(6):
            out, lse = by_hand(call, 0, t, h)
            assert result.out[0, t, h].tolist() == pytest.approx(out, rel=1e-12, abs=1e-14)
            assert result.lse[0, t, h].item() == pytest.approx(lse, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 3, "sinks": torch.linspace(-1, 2, 6)},
        {"softcap": 2.0, "alibi_slopes": torch.linspace(0.1, 0.6, 6)},
    ],
    ids=["plain", "window and sinks", "softcap and ALiBi"],
)
@pytest.mark.parametrize("rows", [20, 200])
def test_what_runs_is_the_formula_at_a_glance(options: dict[str, object], rows: int) -> None:
    """Few rows at once and many in steps; an empty row among them; several sequences."""
    call = problem(rows=rows, batch=2, size=8, **options)
    call.kv_len[0, 3] = 0
    fast, plain = exact_attention(call), reference_attention(call)
    torch.testing.assert_close(fast.out, plain.out, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(fast.lse, plain.lse, rtol=1e-12, atol=1e-14)


def test_query_heads_read_their_own_kv_head() -> None:
    call = problem(rows=1, kv_heads=3, ratio=2)
    out = exact_attention(call).out[0, 0]
    assert torch.equal(out, call.v[0, 0].double().repeat_interleave(2, 0))


def test_an_empty_row_is_zero_with_lse_minus_infinity() -> None:
    c = problem(rows=4)
    none = torch.zeros_like(c.kv_len)
    result = ExactKernel("exact").attend(c.q, c.k, c.v, kv_len=none, scale=c.scale)
    assert not result.out.any()
    assert (result.lse == -math.inf).all()


def test_an_empty_row_with_a_sink_is_the_sink() -> None:
    c = problem(rows=4)
    sinks = torch.linspace(-2, 2, 6)
    result = ExactKernel("exact").attend(
        c.q, c.k, c.v, kv_len=torch.zeros_like(c.kv_len), scale=c.scale, sinks=sinks
    )
    assert not result.out.any()
    assert torch.allclose(result.lse[0, 0], sinks)


Q, K, V = torch.zeros(1, 6, 6, 8), torch.zeros(1, 6, 2, 8), torch.zeros(1, 6, 2, 8)
KV_LEN = torch.arange(1, 7, dtype=torch.int32)[None]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": Q[..., :5]}, "k: expected head size 5 as q has, got 8"),
        ({"q": Q[:, :, :5]}, "q: 5 query heads are not a multiple of 2"),
        ({"q": Q[0]}, r"q: expected 4 dimensions .* \[6, 6, 8\]"),
        ({"k": K[:, :4]}, "v: expected"),
        ({"k": K.expand(3, -1, -1, -1)}, "k, v: expected batch 1"),
        ({"v": V.half()}, "one dtype, got torch.float32, torch.float32, torch.float16"),
        ({"v": V.int()}, "v: expected a floating dtype"),
        ({"kv_len": KV_LEN + 1}, "kv_len: expected values from 0 to S = 6, got 2 to 7"),
        ({"kv_len": KV_LEN[:, :2]}, "kv_len: expected shape"),
        ({"kv_len": KV_LEN.float()}, "kv_len: expected int32"),
        ({"sliding_window": 0}, "sliding_window: expected at least 1, got 0"),
        ({"softcap": -1.0}, "softcap: expected a positive number"),
        ({"sinks": torch.zeros(5)}, r"sinks: expected shape \[Hq\] = \[6\]"),
        ({"alibi_slopes": torch.zeros(2)}, "alibi_slopes: expected shape"),
        ({"path": "train"}, "path: expected decode, several or prefill"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], named: str) -> None:
    given: dict[str, Any] = {"q": Q, "k": K, "v": V, "kv_len": KV_LEN, "scale": 1.0} | change
    with pytest.raises(ValueError, match=named):
        checked_call(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize("ends", ["right", "wrong", "raises"])
def test_one_launch_is_taken_where_it_says_what_products_say(
    ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that makes something else of it, or nothing, changes no result."""
    taken: list[int] = []

    def in_one_launch(call: Call) -> AttentionOutput:
        taken.append(call.shape.rows)
        if ends == "raises":
            raise RuntimeError("PassManager::run failed")
        found = reference_attention(call)
        return found if ends == "right" else replace(found, lse=found.lse * (1 + 1e-9))

    monkeypatch.setattr(exact, "can_run", lambda device: True)
    monkeypatch.setattr(exact, "fused_attention", in_one_launch)
    exact._fused_agrees.cache_clear()
    call = problem(rows=70, size=16)
    due = reference_attention(call)
    for _ in range(2):
        found = exact_attention(call)
        assert torch.allclose(found.out, due.out, rtol=1e-13)
        assert torch.allclose(found.lse, due.lse, rtol=1e-13)
    # Asked once; then each call of many plain rows is, and no other.
    assert taken == ([65, 70, 70] if ends == "right" else [65])
    taken.clear()
    changes: list[dict[str, Any]] = [
        {"softcap": 2.0}, {"sliding_window": 9}, {"sinks": torch.ones(6)}, {"alibi_slopes": torch.ones(6)},
        {"mask": torch.ones(1, 1, 70, 70, dtype=torch.bool)},
    ]  # fmt: skip
    for other in (problem(rows=20, size=16), problem(size=24), *(replace(call, **x) for x in changes)):
        exact_attention(other)
    exact_attention(call, lambda a, b: torch.bmm(a, b))
    assert taken == []
    exact._fused_agrees.cache_clear()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_sequences_together_are_those_alone(count: int) -> None:
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(3, 5, 6, 16, generator=generator)
    k, v = (torch.randn(3, 9, 2, 16, generator=generator) for _ in range(2))
    call = checked_call(
        q, k, v, kv_len=torch.tensor([[0, 3, 9, 4, 1]] * 3), scale=0.3, sliding_window=4, softcap=2.0,
        sinks=torch.randn(6, generator=generator), alibi_slopes=torch.rand(6, generator=generator),
    )  # fmt: skip
    together, alone = _sequences_together(call, count), exact_attention(call)
    assert torch.allclose(together.out, alone.out, rtol=1e-13)
    assert torch.allclose(together.lse, alone.lse, rtol=1e-13)


@pytest.mark.parametrize("scale", [0.125, 0.0883])
def test_where_the_scale_is_multiplied_in_moves_no_bit(scale: float) -> None:
    """A power of two goes into the queries, where there are fewer numbers; others into the logits."""

    def after_the_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.bmm(a, b)

    call = replace(problem(rows=20, size=64), scale=scale)
    found, due = exact_attention(call), exact_attention(call, after_the_product)
    assert torch.equal(found.out, due.out) and torch.equal(found.lse, due.lse)
