"""The flash kernel on a CUDA device: the laws of the interpreter's tests, and what only a device can show."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from support import flash_counting as counting
from support import flash_forms as forms
from support import flash_laws as laws
from verify.kernels.call import checked_call
from verify.kernels.eager import EagerKernel
from verify.kernels.exact import FUSED_AGREES, _attention, _fused_agrees, exact_attention
from verify.kernels.exact_fused import fused_attention
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.heads import Heads
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.registry import build_kernel

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")


@pytest.mark.parametrize("case", laws.CASES, ids=lambda case: case.name)
def test_agrees_with_exact(case: laws.Case) -> None:
    laws.agrees_with_exact(case, CUDA)


@pytest.mark.parametrize(
    "law",
    [
        laws.float16_accumulators_lose_precision,
        laws.groupings_agree_to_the_bit,
        laws.automatic_cuts_move_with_the_groups,
        laws.a_policy_runs_each_row_by_its_own_length,
        laws.strides_are_followed_or_copied_with_a_note,
        laws.a_latent_cache_is_read_once_or_twice_alike,
        laws.quantised_caches_are_read_as_they_are_expanded,
        laws.every_reader_keeps_its_budget,
        laws.the_compiled_reader_keeps_its_budget_and_its_plan,
        laws.a_quantised_row_alone_is_the_row_in_its_batch,
    ],
    ids=lambda law: law.__name__,
)
def test_law(law: Callable[[torch.device], None]) -> None:
    law(CUDA)


def test_chunks_of_rows_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    laws.chunks_of_rows_change_no_bit(CUDA, monkeypatch)


@pytest.mark.parametrize(("ratio", "k_size", "v_size"), [(1, 64, 64), (3, 64, 64), (8, 32, 16), (20, 64, 32)])
def test_exact_attention_in_one_launch(ratio: int, k_size: int, v_size: int) -> None:
    """What the kernels are measured by: against the formula, and of a window against matrix products."""
    forms.fused_attention_is_exact(CUDA, ratio, k_size, v_size, longest=333)
    heads = Heads.grouped(kv=2, ratio=ratio, k_size=k_size, v_size=v_size)
    call = draw("gaussian", InputSizes(n_kv=tuple(range(1, 701)), batch=2, heads=heads), 1, device=CUDA)
    assert _fused_agrees(CUDA, heads)
    found, due = exact_attention(call), _attention(call, torch.bmm, with_lse=True)
    for mine, its in ((found.out, due.out), (found.lse, due.lse)):
        assert bool((mine - its).norm() <= FUSED_AGREES * its.norm())
    assert torch.equal(found.out, fused_attention(call).out)


PATHS = ("decode", "several", "prefill")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", forms.FORMS)
def test_a_form_changes_no_bit(form: str, path: str) -> None:
    forms.a_form_changes_no_bit(form, path, CUDA, ("gaussian", "window"))


def test_laws_of_forms() -> None:
    for path in PATHS:
        forms.a_mask_that_says_causal_is_causal(path, CUDA)
    forms.any_mask_is_within_the_budget(CUDA, PATHS)
    forms.any_list_is_within_the_budget(CUDA, ("window", "alibi", "sinks"))
    for path in ("several", "decode"):
        forms.rows_are_rows_alone(path, CUDA, forms.ROW_FAMILIES)
    forms.a_sequence_alone_is_the_sequence_in_its_batch(CUDA)


@pytest.mark.parametrize("path", PATHS)
def test_chunks_of_packed_rows_change_no_bit(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forms.chunks_of_packed_rows_change_no_bit(path, CUDA, monkeypatch)


def test_pages_beyond_two_to_the_31_numbers() -> None:
    """Page numbers of more than 16 bits, whose keys lie beyond 2^31 numbers and 2^32 bytes."""
    torch.manual_seed(0)
    page, pages, n_kv = 16, 140_000, 300
    q = torch.randn(1, 4, 16, 128, dtype=torch.float16, device=CUDA)
    k = torch.randn(1, n_kv + 4, 8, 128, dtype=torch.float16, device=CUDA)
    v = torch.randn_like(k)
    more = {"kv_len": torch.arange(n_kv - 3, n_kv + 1, dtype=torch.int32, device=CUDA)[None], "scale": 0.09}
    assert pages * page * 8 * 128 > 2**31 and pages > 2**17
    pools = [torch.full((pages, page, 8, 128), float("nan"), dtype=torch.float16, device=CUDA) for _ in "kv"]
    ids = torch.randperm(2000)[: -(-n_kv // page)] + pages - 2000
    for pool, x in zip(pools, (k, v), strict=True):
        for i, name in enumerate(ids.tolist()):
            held = x[0, i * page : min((i + 1) * page, n_kv)]
            pool[name, : len(held)] = held
    table = torch.cat((ids, torch.tensor([-1, 2**31 - 1]))).int()[None].to(CUDA)
    for path in ("decode", "several", "prefill"):
        flash = FlashKernel("flash", TileOptions(plan=Plan(kv=KVCuts("parts", 2))))
        expected = flash.attend(q, k, v, path=path, **more)
        found = flash.attend(q, *pools, block_table=table, path=path, **more)
        assert torch.equal(found.out, expected.out) and torch.equal(found.lse, expected.lse), path
        assert flash.notes == []


def test_lists_beyond_two_to_the_31_numbers() -> None:
    keys = 2**21 + 500
    k = torch.empty(1, keys, 8, 128, dtype=torch.float16, device=CUDA)
    v = torch.empty_like(k)
    q = torch.randn(1, 1, 16, 128, dtype=torch.float16, device=CUDA)
    listed = torch.tensor([keys - 1, 5, keys - 300, 70, 2**21 + 3], dtype=torch.int32, device=CUDA)
    for x in (k, v):
        x[0, listed.long()] = torch.randn(5, 8, 128, dtype=torch.float16, device=CUDA)
    flash = FlashKernel("flash", TileOptions())
    length = torch.tensor([[keys]], dtype=torch.int32, device=CUDA)
    found = flash.attend(q, k, v, keys=listed[None, None], kv_len=length, scale=0.09)
    few = [x[:, listed.long()] for x in (k, v)]
    expected = flash.attend(q, *few, kv_len=torch.full_like(length, 5), scale=0.09)
    assert torch.equal(found.out, expected.out) and torch.equal(found.lse, expected.lse)


@pytest.mark.parametrize("n_q", [2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize(("r", "size"), [(1, 64), (8, 64), (12, 128), (16, 128), (7, 80), (4, 256)])
def test_several_tokens_at_every_ratio(n_q: int, r: int, size: int) -> None:
    lengths = [[333 + t for t in range(n_q)], [0, *range(1, n_q)]]
    for plan in (Plan(kv=KVCuts("parts", 3)), Plan(kv=KVCuts("auto"))):
        case = laws.Case("several", size, size, r, 2, lengths, path="several", p="f16", plan=plan)
        laws.agrees_with_exact(case, CUDA)


def test_bfloat16_groupings_agree_to_the_bit() -> None:
    laws.groupings_agree_to_the_bit(CUDA, torch.bfloat16)


@pytest.mark.parametrize("r", [1, 2, 3, 4, 7, 8, 12, 16, 20, 32, 48, 64])
@pytest.mark.parametrize(
    ("k_size", "v_size"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)]
)
def test_every_ratio_and_head_size(r: int, k_size: int, v_size: int) -> None:
    case = laws.Case("sweep", k_size, v_size, r, 1, [[0, 1, 333]], plan=Plan(kv=KVCuts("parts", 3)))
    laws.agrees_with_exact(case, CUDA)


def test_long_rows_in_a_window_are_what_they_are_alone() -> None:
    """A window of a long context, every bit; one binary whatever the cuts."""
    torch.manual_seed(0)
    q = torch.randn(2, 48, 24, 128, dtype=torch.float16, device=CUDA)
    k = torch.randn(2, 3000, 2, 128, dtype=torch.float16, device=CUDA)
    v = torch.randn_like(k)
    kv_len = torch.randint(0, 3001, (2, 48), dtype=torch.int32, device=CUDA)
    binaries = set()
    for kv in (KVCuts(), KVCuts("parts", 5), KVCuts("parts", 17), KVCuts("size", 512), KVCuts("auto")):
        flash = FlashKernel("flash", TileOptions(plan=Plan(kv=kv)))
        together = flash.attend(q, k, v, kv_len=kv_len, scale=0.09)
        assert flash.notes == [], "what was written is what was planned"
        for t in range(48):
            alone = flash.attend(q[1:, t : t + 1], k[1:], v[1:], kv_len=kv_len[1:, t : t + 1], scale=0.09)
            assert torch.equal(alone.out[0, 0], together.out[1, t])
            assert torch.equal(alone.lse[0, 0], together.lse[1, t])
        binaries |= {signature.binary.split("+")[0] for _, _, signature in together.launched.rows}
    assert len(binaries) == 1


@pytest.mark.parametrize(
    ("r", "size", "dtype", "p", "acc"),
    [
        (1, 64, torch.float16, "f16", "f32"), (2, 128, torch.bfloat16, "f16", "f32"),
        (3, 64, torch.float16, "f16", "f32"), (3, 64, torch.float16, "f32", "f32"),
        (3, 64, torch.float16, "f16", "f16"), (4, 256, torch.float16, "f16", "f32"),
        (5, 80, torch.bfloat16, "bf16", "f32"), (7, 64, torch.float32, "f32", "f32"),
        (8, 128, torch.float16, "f16", "f32"), (12, 128, torch.float16, "f16", "f32"),
        (12, 128, torch.bfloat16, "bf16", "f32"), (20, 128, torch.float16, "f32", "f32"),
        (6, 128, torch.float16, "bf16", "f16"), (4, 64, torch.bfloat16, "f32", "f32"),
    ],
)  # fmt: skip
def test_rows_that_share_a_tile_are_what_they_are_alone(
    r: int, size: int, dtype: torch.dtype, p: str, acc: str
) -> None:
    """Rows of a window, one key more each, and rows of any lengths, every bit of them: alone they are
    products of 16 rows, side by side of 64 where they are of 64 or 128 numbers of 16 bits. Of logits near
    each other and far apart, of values of all sizes, with each option."""
    torch.manual_seed(r)
    following = torch.arange(990, 1030, dtype=torch.int32, device=CUDA)
    kv_len = torch.stack((following, torch.randint(0, 1101, (40,), dtype=torch.int32, device=CUDA)))
    heads = None if r == 1 else (r - r // 2, r // 2)
    slopes = torch.rand(2 * r, device=CUDA) / 8
    options: tuple[tuple[float, dict[str, Any]], ...] = (
        (1.0, {}), (30.0, {}), (1.0, {"softcap": 5.0}), (1.0, {"alibi_slopes": slopes}),
        (4.0, {"sliding_window": 200}), (1.0, {"sinks": torch.randn(2 * r, device=CUDA)}),
    )  # fmt: skip
    for spread, of in options:
        q = spread * torch.randn(2, 40, 2 * r, size, device=CUDA).to(dtype)
        k, v = (torch.randn(2, 1100, 2, size, device=CUDA).to(dtype) for _ in "kv")
        v *= torch.exp2(torch.randint(-9, 4, (2, 1100, 2, 1), device=CUDA)).to(dtype)
        more = {"scale": size**-0.5, **of}
        for plan in (Plan(), Plan(kv=KVCuts("parts", 4), heads=heads)):
            flash = FlashKernel("flash", TileOptions(plan=plan, p=p, acc=acc))
            together = flash.attend(q, k, v, kv_len=kv_len, **more)
            for b in range(2):
                for t in range(0, 40, 1 if spread == 1 and not of else 3):
                    row = slice(t, t + 1)
                    alone = flash.attend(
                        q[b : b + 1, row], k[b : b + 1], v[b : b + 1], kv_len=kv_len[b : b + 1, row], **more
                    )
                    what = (plan, spread, of, b, t)
                    assert torch.equal(alone.out[0, 0], together.out[b, t]), what
                    assert torch.equal(alone.lse[0, 0], together.lse[b, t]), what
            assert flash.notes == []


def test_offsets_beyond_32_bits() -> None:
    """Keys whose offset passes 2^31 numbers, in k and v: the same bits as a copy of them alone."""
    heads, size = 8, 128
    keys = (1 << 31) // (heads * size) + 64
    need = 2 * 2 * keys * heads * size + (2 << 30)
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB of device memory")
    cache = torch.empty(2, 1, keys, heads, size, dtype=torch.float16, device=CUDA)
    cache[:, :, -512:] = torch.randn(2, 1, 512, heads, size, dtype=torch.float16, device=CUDA)
    q = torch.randn(1, 1, 12 * heads, size, dtype=torch.float16, device=CUDA)
    last = keys // 64 * 64
    more = {"scale": 0.09, "sliding_window": 200}
    flash = FlashKernel("flash", TileOptions())
    n_kv = torch.tensor([[last]], dtype=torch.int32, device=CUDA)
    found = flash.attend(q, cache[0], cache[1], kv_len=n_kv, **more)
    near = cache[:, :, last - 256 : last].clone()
    n_kv = torch.full_like(n_kv, 256)
    expected = flash.attend(q, near[0], near[1], kv_len=n_kv, **more)
    assert laws.same_bits(found, expected)


def test_flash_is_the_cuda_kernel_and_says_what_it_launched() -> None:
    x = laws.inputs(laws.Case("trace", ratio=12, p="f16"), CUDA)
    flash = build_kernel("flash:heads=8+4,kv=2")
    assert isinstance(flash, FlashKernel) and flash.notes == []
    launched = flash.attend(x.q, x.k, x.v, **x.more).launched
    at_200 = [signature for path, n_kv, signature in launched.rows if n_kv == 200]
    assert [(s.kernel, s.head_groups, s.cuts, s.launch) for s in at_200] == [
        ("flash[block=64,p=f16,acc=f32,out=f32]", (8, 4), (0, 128, 200), "one")
    ]
    assert len(at_200[0].binary.split("+")) == 2


@pytest.mark.parametrize("spoil", ["device", "plan"])
def test_a_plan_that_did_not_run_is_not_what_it_says(
    spoil: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counting.a_plan_that_did_not_run_is_not_what_it_says(spoil, CUDA, monkeypatch, tmp_path)


def test_parts_that_begin_elsewhere_are_not_the_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counting.parts_that_begin_elsewhere_are_not_the_plan(CUDA, monkeypatch, tmp_path)


def test_the_first_of_like_calls_is_counted_and_a_sample_after(monkeypatch: pytest.MonkeyPatch) -> None:
    counting.the_first_of_like_calls_is_counted_and_a_sample_after(CUDA, monkeypatch)


def test_of_the_largest_calls_the_first_sequences_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counting.of_the_largest_calls_the_first_sequences_are_counted(CUDA, monkeypatch)


def test_what_is_not_launched_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counting.what_is_not_launched_is_not_counted(CUDA, monkeypatch)


def test_a_ready_call_can_be_captured() -> None:
    """Nothing is counted in it, so nothing waits for the device; replayed, it gives the same bits."""
    x = laws.inputs(laws.Case("graph", p="f16", plan=Plan(kv=KVCuts("parts", 2))), CUDA)
    ready = build_kernel("flash:kv=2").ready(checked_call(x.q, x.k, x.v, **x.more))
    first = ready.launch()
    expected = first.out.clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = ready.launch()
    captured.out.fill_(7.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured.out, expected)


def test_cpu_tensors_run_as_eager_with_a_note() -> None:
    x = laws.inputs(laws.Case("cpu", p="f16"), torch.device("cpu"))
    flash = build_kernel("flash")
    found = flash.attend(x.q, x.k, x.v, **x.more)
    assert laws.same_bits(found, EagerKernel("eager", TileOptions()).attend(x.q, x.k, x.v, **x.more))
    assert len(flash.notes) == 1 and "did not run" in flash.notes[0]


def test_float16_accumulators_degrade_with_the_length_of_a_part() -> None:
    """About as the square root of the keys a part holds; more parts, less error."""
    torch.manual_seed(0)
    keys = 65_536
    q = torch.randn(1, 1, 12, 128, dtype=torch.float16, device=CUDA)
    k = torch.randn(1, keys, 1, 128, dtype=torch.float16, device=CUDA)
    v = torch.randn_like(k)

    def error(n_kv: int, parts: int) -> float:
        more = {"kv_len": torch.tensor([[n_kv]], dtype=torch.int32, device=CUDA), "scale": 128**-0.5}
        exact = exact_attention(checked_call(q, k, v, **more)).out
        flash = FlashKernel("flash", TileOptions(plan=Plan(kv=KVCuts("parts", parts)), acc="f16"))
        return float((flash.attend(q, k, v, **more).out.double() - exact).norm() / exact.norm())

    by_length = [error(n, 1) for n in (4096, 16_384, 65_536)]
    assert all(1.3 < b / a < 3.5 for a, b in pairwise(by_length)), by_length
    by_parts = [error(65_536, parts) for parts in (1, 4, 16)]
    assert by_parts[0] > 1.3 * by_parts[1] > 1.3**2 * by_parts[2], by_parts
