from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from support.problems import problem
from verify.kernels import eager
from verify.kernels.budget.bound import error_budget
from verify.kernels.call import Call, Result
from verify.kernels.exact import exact_attention
from verify.kernels.registry import build_kernel
from verify.kernels.trace import LaunchTrace

SPECS = (
    "eager",
    "eager:block=16",
    "eager:heads=2+1",
    "eager:heads=1+1+1,kv=3",
    "eager:kv=size:16,block=16",
    "eager:kv=auto,block=16",
    "eager:p=f32",
    "eager:p=bf16",
    "eager:out=f16",
    "eager:acc=f16",
    "eager:launch=each,heads=split,kv=2",
)
VARIANTS = (
    {},
    {"sliding_window": 7},
    {"softcap": 3.0},
    {"sinks": torch.linspace(-1, 2, 6)},
    {"alibi_slopes": torch.linspace(0.05, 0.5, 6)},
)


def run(spec: str, call: Call) -> Result:
    return build_kernel(spec).run(call)


@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("spec", SPECS)
def test_within_budget_of_exact(spec: str, path: str) -> None:
    for seed, sharpness in enumerate((0.3, 1.0, 6.0)):
        call = problem(rows=150, seed=seed, sharpness=sharpness, path=path)
        kernel = build_kernel(spec)
        result = kernel.run(call)
        budget = error_budget(call, kernel.arithmetic(call.shape, call.path))
        assert ((result.out - budget.out).abs() <= budget.bound).all()
        assert ((result.lse - budget.lse).abs() <= budget.lse_bound).all()
        assert not budget.vacuous.all()


@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: next(iter(o), "plain"))
def test_every_option_agrees_with_exact(options: dict[str, object], path: str) -> None:
    call = problem(rows=150, path=path, **options)
    for spec in ("eager", "eager:heads=2+1,kv=3,block=16"):
        result, oracle = run(spec, call), exact_attention(call)
        assert (result.out - oracle.out).abs().max() < 2e-3
        assert (result.lse - oracle.lse).abs().max() < 1e-5


def test_head_groups_alone_change_no_bit() -> None:
    call = problem(rows=130, ratio=12, kv_heads=2, size=64)
    whole = run("eager:kv=3", call)
    for heads in ("8+4", "4+4+4", "1+11", "6+5+1"):
        other = run(f"eager:kv=3,heads={heads}", call)
        assert torch.equal(whole.out, other.out), heads
        assert torch.equal(whole.lse, other.lse), heads


def test_other_cuts_change_bits() -> None:
    call = problem(rows=130)
    assert not torch.equal(run("eager", call).out, run("eager:kv=2", call).out)


@pytest.mark.parametrize("spec", ["eager", "eager:heads=2+1,kv=3", "eager:kv=auto,block=32"])
def test_a_row_alone_is_the_row_in_a_batch_to_the_bit(spec: str) -> None:
    call = problem(batch=2, rows=140, size=64)
    kernel = build_kernel(spec)
    whole = kernel.run(call)
    for b, t in ((0, 0), (0, 63), (1, 64), (1, 65), (0, 139)):
        alone = kernel.attend(
            call.q[b : b + 1, t : t + 1],
            call.k[b : b + 1, : t + 1],
            call.v[b : b + 1, : t + 1],
            kv_len=call.kv_len[b : b + 1, t : t + 1],
            scale=call.scale,
        )
        assert torch.equal(alone.out[0, 0], whole.out[b, t])
        assert torch.equal(alone.lse[0, 0], whole.lse[b, t])


def test_keys_beyond_kv_len_change_no_bit() -> None:
    call = problem(rows=70)
    kernel = build_kernel("eager:kv=2")
    kv_len = (call.kv_len - 20).clamp(min=1)
    clean = kernel.attend(call.q, call.k, call.v, kv_len=kv_len, scale=call.scale)
    k, v = call.k.clone(), call.v.clone()
    k[:, 50:], v[:, 50:] = 6e4, 6e4
    poisoned = kernel.attend(call.q, k, v, kv_len=kv_len, scale=call.scale)
    assert torch.equal(clean.out[:, :50], poisoned.out[:, :50])


def test_empty_rows_beside_full_ones() -> None:
    call = problem(rows=70)
    kv_len = call.kv_len.clone()
    kv_len[:, ::3] = 0
    for path in ("decode", "prefill"):
        result = build_kernel("eager:kv=2").attend(
            call.q, call.k, call.v, kv_len=kv_len, scale=call.scale, path=path
        )
        assert not result.out[:, ::3].any()
        assert (result.lse[:, ::3] == -math.inf).all()
        assert torch.isfinite(result.out).all()


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 128, 129])
def test_sizes_around_a_tile(rows: int) -> None:
    for path in ("decode", "prefill"):
        call = problem(rows=rows, path=path)
        result, oracle = run("eager:kv=2", call), exact_attention(call)
        assert (result.out - oracle.out).abs().max() < 2e-3


def test_bfloat16_inputs() -> None:
    call = problem(dtype=torch.bfloat16)
    assert (run("eager:p=bf16", call).out - exact_attention(call).out).abs().max() < 2e-2


def test_float16_accumulators_lose_precision_and_more_parts_lose_less() -> None:
    call = problem(rows=600, size=64, kv_heads=1, ratio=2)
    oracle = exact_attention(call).out

    def rms(spec: str) -> float:
        return float((run(spec, call).out - oracle).square().mean().sqrt())

    f32, one, many = rms("eager"), rms("eager:acc=f16"), rms("eager:acc=f16,kv=8")
    assert one > 1.5 * f32
    assert many < one


def test_the_trace_says_what_was_launched() -> None:
    call = problem(rows=130)
    trace = LaunchTrace([run("eager:heads=2+1,kv=2,launch=each", call).launched])
    lines = trace.coverage()
    assert sum(line.rows for line in lines) == 130
    assert {line.head_groups for line in lines} == {(2, 1)}
    # One tile cannot be cut in two: up to 64 keys there is one part.
    assert [(line.parts, line.n_kv_min, line.n_kv_max) for line in lines] == [(1, 1, 64), (2, 65, 130)]
    # Head groups are computed in turn, however the plan would launch them.
    assert {line.launch for line in lines} == {"one"}
    for _, n_kv, signature in trace.rows:
        assert signature.cuts[0] == 0
        assert signature.cuts[-1] == n_kv
        assert all(a < b for a, b in pairwise(signature.cuts))


def test_traces_differ_only_where_plans_do() -> None:
    call = problem(rows=130)
    one, four, again = (LaunchTrace([run(spec, call).launched]) for spec in ("eager", "eager:kv=4", "eager"))
    assert four.differs_from(one) == frozenset(range(65, 131))
    assert not again.differs_from(one)


def test_a_trace_survives_json() -> None:
    trace = LaunchTrace([run("eager:kv=2", problem(rows=70)).launched])
    assert LaunchTrace.from_json(trace.to_json()) == trace


@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_parts_are_counted_where_they_are_closed(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that ignores its cuts, for the first head group alone: each group's own bounds are told."""
    plain = eager._launch

    def one_part(*given: Any) -> Any:
        *before, cuts, heads, keys, values = given
        if int(heads.flatten()[0]) == 0:
            cuts = [(0, bounds[-1]) for bounds in cuts]
        return plain(*before, cuts, heads, keys, values)

    monkeypatch.setattr(eager, "_launch", one_part)
    call = problem(rows=130, path=path)
    trace = LaunchTrace([run("eager:heads=2+1,kv=2", call).launched])
    assert {(s.head_groups, s.cuts) for _, s in trace.at(130)} == {((2,), (0, 130)), ((1,), (0, 64, 130))}
    if path == "decode":
        assert {(s.head_groups, s.cuts) for _, s in trace.at(64)} == {((2, 1), (0, 64))}


def test_a_row_without_keys_has_no_part() -> None:
    call = problem(rows=2)
    empty = replace(call, kv_len=torch.zeros_like(call.kv_len))
    assert {s.cuts for _, _, s in run("eager:kv=2", empty).launched.rows} == {(0,)}


@pytest.mark.parametrize("path", ["decode", "several"])
@pytest.mark.parametrize("spec", ["eager", "eager:heads=8+16", "eager:acc=f16,kv=3"])
def test_products_of_any_height_move_no_bit(spec: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = problem(rows=150 if path == "decode" else 16, ratio=24, path=path)
    found = run(spec, call)
    monkeypatch.setattr(eager, "_packs", lambda *_: False)
    narrow = run(spec, call)
    assert torch.equal(found.out, narrow.out)
    assert torch.equal(found.lse, narrow.lse)
    assert found.launched.rows == narrow.launched.rows


@pytest.mark.parametrize("wrong", [2, 57, 1086])
def test_a_height_of_other_bits_is_seen(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = eager._product

    def shifted(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tile: int | None) -> None:
        plain(a, b, out, tile)
        if a.shape[2] == wrong:
            out[..., -1, -1] = torch.nextafter(out[..., -1, -1], out.new_tensor(torch.inf))

    asked = eager._height_moves_no_bit.__wrapped__
    monkeypatch.setattr(eager, "_product", shifted)
    assert not asked(48, 32)


def test_a_call_that_was_made_before_launches_the_same() -> None:
    """What is counted alike is one object; calls whose lengths differ are not taken for each other."""
    call = problem(rows=130)
    kernel = build_kernel("eager:kv=2")
    first, again = kernel.run(call), kernel.run(call)
    assert first.launched is again.launched
    fewer = replace(call, kv_len=(call.kv_len - 70).clamp(min=1))
    assert {n for _, n, _ in kernel.run(fewer).launched.rows} == set(range(1, 61))
