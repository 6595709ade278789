"""Laws of the flash kernel, run by `test_flash.py` on Triton's interpreter and by `tests/cuda` on a GPU.

A law is a function of a device. Cases are small: the interpreter takes tens of milliseconds a program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from verify.kernels.budget.bound import error_budget
from verify.kernels.cache_types import parse_cache
from verify.kernels.call import AttentionOutput, checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.flash.compiled import why_not
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.judging.figures import budget_ratio
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.tile_options import TileOptions
from verify.laws.tolerance import against_exact

# With 64 keys a tile: no key, one, tile - 1, tile, tile + 1, several tiles and a rest.
LENGTHS = [[0, 1, 63], [64, 65, 200]]


@dataclass(frozen=True)
class Case:
    """A call; sizes as in `contract.Shape`, `call` what else `attend` takes, by name."""

    name: str
    k_size: int = 64
    v_size: int = 64
    ratio: int = 3
    kv_heads: int = 2
    lengths: list[list[int]] = field(default_factory=lambda: LENGTHS)
    dtype: torch.dtype = torch.float16
    path: str = "decode"
    p: str = "f32"
    plan: Plan = Plan()  # noqa: RUF009 (frozen)
    call: tuple[str, ...] = ()


def _sizes(k_size: int, v_size: int, ratio: int, **more: Any) -> Case:
    return Case(f"{k_size}-{v_size}-r{ratio}", k_size, v_size, ratio, 1, [[65, 1]], **more)


CASES = [
    Case("plain"),
    Case("f16-p", p="f16"),
    Case("bf16-p", p="bf16"),
    Case("bf16", dtype=torch.bfloat16),
    Case("bf16-f16-p", dtype=torch.bfloat16, p="f16"),
    Case("bf16-bf16-p", dtype=torch.bfloat16, p="bf16"),
    Case("f32", dtype=torch.float32),
    Case("parts", plan=Plan(kv=KVCuts("parts", 3))),
    Case("more-parts-than-one-round", plan=Plan(kv=KVCuts("parts", 19), block=16), lengths=[[310, 40]]),
    Case("part-size", plan=Plan(kv=KVCuts("size", 128))),
    Case("block-32", plan=Plan(kv=KVCuts("parts", 2), block=32)),
    Case("softcap", call=("softcap",)),
    Case("window", plan=Plan(kv=KVCuts("parts", 2)), call=("sliding_window",)),
    Case("sinks", call=("sinks",)),
    Case("sinks-parts", plan=Plan(kv=KVCuts("parts", 2)), call=("sinks",)),
    Case("alibi", call=("alibi_slopes",)),
    Case("all", plan=Plan(kv=KVCuts("size", 64), heads=(2, 1)), call=("softcap", "sliding_window", "sinks")),
    Case("prefill", path="prefill"),
    Case("prefill-parts", path="prefill", plan=Plan(kv=KVCuts("parts", 3), heads=(2, 1)), call=("sinks",)),
    Case("prefill-window", path="prefill", call=("sliding_window", "alibi_slopes", "softcap")),
    Case("prefill-long", path="prefill", ratio=5, kv_heads=1, lengths=[list(range(3, 63))]),
    _sizes(80, 80, 1),
    _sizes(96, 96, 7),
    _sizes(128, 128, 12),
    _sizes(192, 128, 16),
    _sizes(256, 256, 4),
    _sizes(576, 512, 20),
    _sizes(72, 40, 2),
    _sizes(80, 80, 48),
    _sizes(96, 40, 64),
    Case("prefill-80", 80, 80, path="prefill"),
    Case("prefill-96", 96, 32, path="prefill", p="f16"),
    Case("prefill-256", 256, 256, 4, 1, [[65, 66, 67]], path="prefill"),
    Case("prefill-mla", 576, 512, 20, 1, [[65, 66, 67]], path="prefill", p="f16"),
    _sizes(64, 64, 64),
]  # fmt: skip


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    more: dict[str, Any]


def inputs(case: Case, device: torch.device) -> Inputs:
    """Gaussian inputs of a case; keys that no row sees hold 6e4, which shows where it leaks in."""
    generator = torch.Generator().manual_seed(len(case.name))
    kv_len = torch.tensor(case.lengths, dtype=torch.int32)
    batch, rows = kv_len.shape
    keys, q_heads = int(kv_len.max()) + 3, case.ratio * case.kv_heads

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q = normal(batch, rows, q_heads, case.k_size)
    k = normal(batch, keys, case.kv_heads, case.k_size)
    v = normal(batch, keys, case.kv_heads, case.v_size)
    for b in range(batch):
        seen = int(kv_len[b].max())
        k[b, seen:], v[b, seen:] = 6e4, 6e4
    options: dict[str, Any] = {
        "softcap": 3.0,
        "sliding_window": 40,
        "sinks": normal(q_heads).to(device),
        "alibi_slopes": (normal(q_heads).abs() / 8).to(device),
    }
    more = {name: options[name] for name in case.call}
    more |= {"kv_len": kv_len.to(device), "scale": case.k_size**-0.5, "path": case.path}
    q, k, v = (x.to(case.dtype).to(device) for x in (q, k, v))
    return Inputs(q, k, v, more)


def kernel(case: Case, **options: Any) -> FlashKernel:
    return FlashKernel("flash", TileOptions(plan=case.plan, p=case.p, **options))


def same_bits(a: AttentionOutput, b: AttentionOutput) -> bool:
    return torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse)


def agrees_with_exact(case: Case, device: torch.device) -> None:
    """Within the budget of the oracle; empty rows give (0, -inf), or (0, sink), to the bit."""
    x = inputs(case, device)
    call = checked_call(x.q, x.k, x.v, **x.more)
    flash = kernel(case)
    against_exact(flash, call, lse=True)
    found = flash.run(call)
    assert bool((found.out[call.kv_len == 0] == 0).all())
    assert sum(found.launched.rows.values()) == call.kv_len.numel()
    # What the device wrote is the plan, or a note would say so.
    assert flash.notes == []


def float16_accumulators_lose_precision(device: torch.device) -> None:
    case = Case("acc", p="f16", lengths=[[500]], kv_heads=1)
    x = inputs(case, device)
    exact = exact_attention(checked_call(x.q, x.k, x.v, **x.more)).out
    errors = {
        acc: float((kernel(case, acc=acc).attend(x.q, x.k, x.v, **x.more).out.double() - exact).norm())
        for acc in ("f32", "f16")
    }
    assert 1.2 * errors["f32"] < errors["f16"] < 20 * errors["f32"], errors


def groupings_agree_to_the_bit(device: torch.device, dtype: torch.dtype = torch.float16) -> None:
    """Any head groups, in one launch or several: one binary, and so every bit equal (NUMERICS 4)."""
    by_parts, by_size, whole = KVCuts("parts", 3), KVCuts("size", 64), KVCuts()
    for path, kv in (("decode", by_parts), ("decode", by_size), ("prefill", whole)):
        case = Case("groups", ratio=12, kv_heads=2, lengths=[[130]], dtype=dtype, path=path, p="f16")
        x = inputs(case, device)
        plans = [Plan(kv=kv)]
        plans += [Plan(kv=kv, heads=heads) for heads in ((8, 4), (4, 4, 4), (4, 8), (1, 11))]
        plans += [Plan(kv=kv, heads=(8, 4), launch="each"), Plan(kv=kv, heads=(4, 8), launch="views")]
        if device.type == "cpu" and kv != by_parts:
            # The interpreter takes half a second a launch: an even and an uneven cut stand for the others.
            plans = [plan for plan in plans if plan.heads in (None, (8, 4), (1, 11))]
        results, binaries, groups = [], set(), set()
        for plan in plans:
            flash = FlashKernel("flash", TileOptions(plan=plan))
            results.append(flash.attend(x.q, x.k, x.v, **x.more))
            signatures = [signature for _, _, signature in results[-1].launched.rows]
            binaries |= {signature.binary for signature in signatures}
            groups |= {signature.head_groups for signature in signatures}
        for plan, result in zip(plans, results, strict=True):
            assert same_bits(results[0], result), f"{path}, {plan}"
        assert len(binaries) == 1, binaries
        assert groups == {plan.heads or (12,) for plan in plans}


def automatic_cuts_move_with_the_groups(device: torch.device) -> None:
    """`kv=auto` cuts by head groups: other bits, and the trace shows why."""
    case = Case("auto", ratio=12, kv_heads=1, lengths=[[700]], p="f16")
    x = inputs(case, device)
    cuts, results = [], []
    for heads in ((12,), (8, 4)):
        flash = FlashKernel("flash", TileOptions(plan=Plan(heads=heads, kv=KVCuts("auto"), sms=12)))
        results.append(flash.attend(x.q, x.k, x.v, **x.more))
        ((_, _, signature),) = results[-1].launched.rows
        cuts.append(signature.cuts)
    assert [len(c) - 1 for c in cuts] == [6, 3]
    assert not same_bits(*results)


def a_policy_runs_each_row_by_its_own_length(device: torch.device) -> None:
    """Rows on both sides of a threshold, in one call: each is traced, and is what it is alone."""
    from verify.kernels.plans.policy import policy_named

    policy = policy_named("ik-1183").with_threshold(256)
    case = Case("policy", ratio=12, kv_heads=1, lengths=[[0, 200, 257]], p="f16", plan=Plan(policy=policy))
    x = inputs(case, device)
    flash = kernel(case)
    together = flash.attend(x.q, x.k, x.v, **x.more)
    seen = {n_kv: (s.head_groups, s.launch) for _, n_kv, s in together.launched.rows}
    assert seen == {0: ((4, 4, 4), "one"), 200: ((8, 4), "each"), 257: ((8, 4), "each")}
    plain = kernel(Case("plain", p="f16")).attend(x.q, x.k, x.v, **x.more)
    assert same_bits(together, plain)


def strides_are_followed_or_copied_with_a_note(device: torch.device) -> None:
    case = Case("strides", p="f16", call=("sinks",))
    x = inputs(case, device)
    expected = kernel(case).attend(x.q, x.k, x.v, **x.more)
    by_head = x.k.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.stack((x.v, -x.v), dim=3).flatten(3)[..., : x.v.shape[3]]
    assert not by_head.is_contiguous() and not wide.is_contiguous()
    flash = kernel(case)
    assert same_bits(expected, flash.attend(x.q, by_head, wide, **x.more))
    assert flash.notes == []
    by_column = x.v.transpose(2, 3).contiguous().transpose(2, 3)
    assert same_bits(expected, flash.attend(x.q, x.k, by_column, **x.more))
    assert [note[:10] for note in flash.notes] == ["v: strides"]


def a_latent_cache_is_read_once_or_twice_alike(device: torch.device) -> None:
    """v as the head of k's own memory (MLA), or as a copy: the same bits."""
    case = Case("latent", 80, 64, 20, 1, [[130, 7]], p="f16")
    x = inputs(case, device)
    view = x.k[..., :64]
    shared = kernel(case).attend(x.q, x.k, view, **x.more)
    copied = kernel(case).attend(x.q, x.k, view.clone(), **x.more)
    assert same_bits(shared, copied)


def chunks_of_rows_change_no_bit(device: torch.device, monkeypatch: Any) -> None:
    """Partial results are held for some rows at a time; how many is no matter."""
    from verify.kernels.flash import launch as flash_launch

    for path in ("decode", "prefill"):
        case = Case("chunks", plan=Plan(kv=KVCuts("parts", 2)), p="f16", path=path, ratio=20, kv_heads=1)
        x = inputs(case, device)
        expected = kernel(case).attend(x.q, x.k, x.v, **x.more)
        # On the interpreter one of both: rows that are all cut, and some that are left over.
        for rows in (1, 4) if device.type == "cuda" else (1,) if path == "prefill" else (4,):
            monkeypatch.setattr(flash_launch, "PARTIALS_AT_ONCE", rows * 2 * 20 * 64)
            assert same_bits(expected, kernel(case).attend(x.q, x.k, x.v, **x.more))
        monkeypatch.undo()


def quantised_caches_are_read_as_they_are_expanded(device: torch.device) -> None:
    """Fused and expanded agree with the oracle on the cache's own numbers; the trace says which ran."""
    from verify.kernels.cache import through_cache
    from verify.kernels.cache_types import CACHE_TYPES

    for cache in CACHE_TYPES:
        for size in (64, 128) if cache in ("q8_0", "q4_0") else (64,):
            case = Case(
                f"{cache}-{size}", size, size, 3, 2, [[0, 65, 130]], p="f16", plan=Plan(kv=KVCuts("parts", 2))
            )
            x = inputs(case, device)
            seen = [through_cache(y, cache) for y in (x.k, x.v)]
            exact = exact_attention(checked_call(x.q, *seen, **x.more)).out
            fused = cache in ("q8_0", "q4_0")
            # Of the others nothing is fused: both words are one launch.
            for expand in ("fused", "f16") if fused or device.type != "cpu" else ("fused",):
                flash = FlashKernel(
                    "flash", TileOptions(plan=case.plan), cache=parse_cache(cache), expand=expand
                )
                found = flash.attend(x.q, x.k, x.v, **x.more)
                error = float((found.out.double() - exact).norm() / exact.norm())
                assert error <= 8e-4, f"{cache}, {expand}, {size}: {error:.3g}"
                ran = "fused" if fused and expand == "fused" else "f16"
                reader = (
                    "cuda" if size == 128 and why_not(checked_call(x.q, x.k, x.v, **x.more)) is None else ""
                )
                reader = reader or ("wide" if cache == "q8_0" else "")
                wide = f",reader={reader}" if reader and ran == "fused" else ""
                label = f"flash[block=64,p=f16,acc=f32,out=f32,cache={cache},expand={ran}{wide}]"
                assert {signature.kernel for _, _, signature in found.launched.rows} == {label}


def every_reader_keeps_its_budget(device: torch.device) -> None:
    """Of each cache that it reads itself, over the parts that `kv=auto` gives the kernel that runs."""
    case = Case("readers", 64, 64, 3, 2, [[65, 300]], p="f16", plan=Plan(kv=KVCuts("auto", 0), sms=6))
    x = inputs(case, device)
    call = checked_call(x.q, x.k, x.v, **x.more)
    for cache in ("q8_0", "q4_0+rotate=mainline", "e4m3", "e4m3+scale=head"):
        readers = ("auto", "wide", "swapped", *(() if "e4m3" in cache else ("chunks",)))
        if device.type == "cpu" and "+" in cache:
            # What is in a cache's numbers besides, every reader is told alike: one slow launch of each.
            readers = readers[-1:]
        for reader in readers:
            options = TileOptions(plan=case.plan)
            flash = FlashKernel("flash", options, cache=parse_cache(cache), reader=reader)
            found, budget = flash.run(call), error_budget(flash.held(call), flash.arithmetic_of(call))
            ratio = budget_ratio(found.out.double() - budget.out, budget.bound)
            assert float(ratio.max()) <= 1, f"{cache}, {reader}"
            kinds = {(signature.cuts, signature.as_planned) for _, _, signature in found.launched.rows}
            # A part has one tile at least, where tiles are read fast two.
            one = {((0, 64, 65), True), ((0, 64, 128, 192, 256, 300), True)}
            assert kinds == ({((0, 65), True), ((0, 128, 300), True)} if "e4m3" in cache else one)
            assert all(",expand=fused" in signature.kernel for _, _, signature in found.launched.rows)


# Of head size 128, and groups that a matrix tile of 16 rows holds.
COMPILED = Case("compiled", 128, 128, 9, 2, [[0, 65], [130, 200]], p="f16", plan=Plan(kv=KVCuts("parts", 2)))


COMPILED_CACHES = (
    "q8_0", "q4_0", "e4m3", "e4m3+scale=head", "q4_0+rotate=mainline",
    "q8_0/q4_0", "q4_0/q8_0", "e4m3/q4_0+scale=head", "q8_0/e4m3",
)  # fmt: skip
COMPILED_PLANS = (
    COMPILED.plan,
    Plan(kv=KVCuts("parts", 2), heads=(5, 4)),
    Plan(kv=KVCuts("parts", 2), heads=(1, 8), launch="each"),
)


def the_compiled_reader_keeps_its_budget_and_its_plan(
    device: torch.device,
    caches: Sequence[str] = COMPILED_CACHES,
    plans: Sequence[Plan] = COMPILED_PLANS,
) -> None:
    """`reader=cuda` of each cache; the same bits whatever heads are in a group and whatever rows in a call,
    and, on a GPU, close to Triton's reader."""
    x = inputs(COMPILED, device)
    call = checked_call(x.q, x.k, x.v, **x.more)
    for cache in caches:
        results = []
        for plan in plans:
            options = TileOptions(plan=plan)
            flash = FlashKernel("flash", options, cache=parse_cache(cache), reader="cuda")
            found, budget = flash.run(call), error_budget(flash.held(call), flash.arithmetic_of(call))
            assert flash.notes == []
            ratio = budget_ratio(found.out.double() - budget.out, budget.bound)
            assert float(ratio.max()) <= 1, f"{cache}, {plan}"
            for _, n_kv, signature in found.launched.rows:
                assert ",expand=fused,reader=cuda" in signature.kernel
                assert (signature.as_planned, len(signature.cuts) - 1) == (True, min(-(-n_kv // 64), 2))
            results.append(found)
        assert all(torch.equal(results[0].out, other.out) for other in results[1:]), cache
        assert all(torch.equal(results[0].lse, other.lse) for other in results[1:]), cache
        more = {**x.more, "kv_len": x.more["kv_len"][1:, 1:2]}
        alone = flash.attend(x.q[1:, 1:2], x.k[1:], x.v[1:], **more)
        assert torch.equal(alone.out[0, 0], found.out[1, 1]), cache
        if device.type == "cuda" and "/" not in cache:
            wide = FlashKernel("flash", options, cache=parse_cache(cache), reader="wide").run(call)
            assert float((wide.out - found.out).norm() / wide.out.norm()) <= 4e-4, cache
            seen = torch.isfinite(wide.lse)
            assert torch.equal(seen, torch.isfinite(found.lse))
            assert float((wide.lse - found.lse)[seen].abs().max()) <= 1e-5, cache


def a_quantised_row_alone_is_the_row_in_its_batch(device: torch.device) -> None:
    case = Case("q", 64, 64, 3, 2, [[1, 65, 130]], p="f16", plan=Plan(kv=KVCuts("parts", 2)))
    x = inputs(case, device)
    for heads in (None, (2, 1)):
        plan = Plan(kv=KVCuts("parts", 2), heads=heads)
        flash = FlashKernel("flash", TileOptions(plan=plan), cache=parse_cache("q8_0"))
        together = flash.attend(x.q, x.k, x.v, **x.more)
        lengths = x.more["kv_len"]
        for t in range(3):
            more = {**x.more, "kv_len": lengths[:, t : t + 1]}
            alone = flash.attend(x.q[:, t : t + 1], x.k, x.v, **more)
            assert torch.equal(alone.out[0, 0], together.out[0, t])
