"""The flash kernel's own source, run by Triton's interpreter on CPU tensors; on a GPU, tests/cuda does it.

Triton chooses to interpret when its functions are decorated, that is on import. The variable that tells it so
is set for that import and while these tests run, so that no other test and no child of one sees it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import flash_counting as counting
from support import flash_forms as forms
from support import flash_laws as laws
from support import reader_on_host
from support.subjects import flash_subject
from support.triton_interpreter import interpreted
from verify.kernels.cache_types import parse_cache
from verify.kernels.call import AttentionPath, Call, checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.flash.kernel import FALLBACK_NOTE, U_TANH, FlashKernel, flash_kernel
from verify.kernels.flash.tiles import Tiles
from verify.kernels.heads import Heads
from verify.kernels.here import why_not_flash
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.other_forms import in_pages
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.registry import build_kernel
from verify.laws import LAWS, Law
from verify.laws.run import run_law

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: its interpreter cannot run the kernel", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a CUDA device is there: tests/cuda runs these laws on it", allow_module_level=True)
with interpreted():
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    from verify.kernels import exact_device
    from verify.kernels.flash import device as flash_device
    from verify.kernels.flash import tile_arithmetic, tile_rows
assert exact_device.tl is tl
assert tile_arithmetic.INTERPRETED, (
    "verify.kernels.flash.tile_arithmetic was imported by something before this test module"
)

CPU = torch.device("cpu")


def _product(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
    """The interpreter's matrix product, each row by itself, as a tensor core's is.

    numpy's own goes through a BLAS that on some processors rounds a row by where it stands in the matrix.
    """
    product = np.einsum("ij,jk->ik", a.data, b.data, dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


@pytest.fixture(autouse=True)
def _interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _product)


def test_tiles_that_the_copy_engine_reads_have_the_bits_of_loads() -> None:
    """Two sequences of unlike lengths in the path prefill, NaN where no row looks."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, rows, heads, 64, generator=generator).half()
        for rows, heads in ((16, 2), (60, 1), (60, 1))
    )
    kv_len = torch.arange(45, 61, dtype=torch.int32).repeat(2, 1)
    kv_len[1] -= 9
    k[1, 51:], v[1, 51:] = torch.nan, torch.nan
    call = checked_call(q, k, v, kv_len=kv_len, scale=0.125, path="prefill")
    flash = FlashKernel(
        "flash", TileOptions(plan=Plan(kv=KVCuts("parts", 2), block=16), p="f16"), tiles=Tiles(16, 16, 4, 2)
    )
    copied, loaded = flash.prepare(call), flash.prepare(call)
    assert copied is not None and loaded is not None
    loaded.copy_engine = False
    assert copied.copies_tiles and not loaded.copies_tiles
    first, second = copied.launch(), loaded.launch()
    assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)
    due = exact_attention(call)
    assert float((first.out.double() - due.out).norm() / due.out.norm()) < 5e-4


def test_a_window_of_rows_fills_its_matrix_tiles() -> None:
    """r = 3 in a tile of 16: five rows side by side, or 21 in one of 64; by the largest head group; none
    where a row is alone, or has a form of its own."""
    sizes = InputSizes(n_kv=tuple(range(1, 13)), heads=Heads.grouped(kv=2, ratio=3, k_size=16, v_size=16))
    window = draw("gaussian", sizes, 1)

    def tokens(call: Call, groups: tuple[int, ...] = (3,), **options: Any) -> int:
        prepared = FlashKernel("flash", TileOptions(), **options).prepare(call)
        assert prepared is not None and prepared.tiles.rows == 16
        return prepared.tokens_a_tile(groups)

    assert tokens(window) == 5 and tokens(window, (2, 1)) == 8
    assert tokens(window.of_rows(torch.tensor([7]))) == tokens(in_pages(window, 16)) == 1
    # The readers of a quantised cache have a tile a row.
    wide = draw("gaussian", replace(sizes, heads=Heads.grouped(kv=1, ratio=3, k_size=64, v_size=64)), 1)
    assert tokens(wide, cache=parse_cache("q8_0")) == 1
    assert tokens(wide, cache=parse_cache("q8_0"), expand="f16") == 21
    assert tokens(wide) == 21 and tokens(wide, (2, 1)) == 32
    # Rows of one length: a number could say it, which of several rows means another thing.
    alike = draw("gaussian", replace(sizes, n_kv=(40,) * 12), 1)
    flash = FlashKernel("flash", TileOptions())
    together, alone = flash.run(alike), flash.run(alike.of_rows(torch.tensor([3])))
    assert torch.equal(together.out[:, 3], alone.out[:, 0]) and torch.equal(
        together.lse[:, 3], alone.lse[:, 0]
    )


def test_lengths_are_said_by_a_number_where_one_says_them() -> None:
    def said(lengths: list[list[int]], path: AttentionPath = "several") -> int:
        rows = torch.tensor(lengths, dtype=torch.int32)
        x = torch.zeros(len(lengths), 300, 1, 16).half()
        call = checked_call(x[:, : rows.shape[1]], x, x, kv_len=rows, scale=1.0, path=path)
        prepared = FlashKernel("flash", TileOptions()).prepare(call)
        assert prepared is not None
        return prepared.launches[0].same_length

    assert said([[97, 98, 99], [97, 98, 99]]) == 99
    assert said([[1, 2]]) == 2
    # The oldest would have no key, rows that do not follow each other, sequences of unlike lengths.
    for lengths in ([[0, 1]], [[97, 98, 98]], [[98, 99], [99, 100]]):
        assert said(lengths) == -1
    assert said([[99], [99]], "decode") == 99
    assert said([[99], [98]], "decode") == said([[98, 99]], "prefill") == -1


@pytest.mark.skipif(not reader_on_host.HAS_COMPILER, reason="no g++ to compile the reader with")
@pytest.mark.parametrize(
    ("late", "caches"),
    [(False, ["q8_0", "q4_0+rotate=mainline"]), (True, ["q8_0/q4_0", "e4m3+scale=head"])],
    ids=["copies at once", "copies late"],
)
def test_the_compiled_reader(late: bool, caches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own source, over stand-ins for a GPU's instructions."""
    reader_on_host.stand_in(monkeypatch, late=late)
    laws.the_compiled_reader_keeps_its_budget_and_its_plan(CPU, caches, laws.COMPILED_PLANS[1:])
    assert {grid[2] for grid in reader_on_host.OnHost.grids} == {2}


@pytest.mark.parametrize("case", laws.CASES, ids=lambda case: case.name)
def test_agrees_with_exact(case: object) -> None:
    laws.agrees_with_exact(case, CPU)


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
        laws.a_quantised_row_alone_is_the_row_in_its_batch,
    ],
    ids=lambda law: law.__name__,
)
def test_law(law: object) -> None:
    law(CPU)  # type: ignore[operator]


@pytest.mark.parametrize(("ratio", "k_size", "v_size"), [(3, 16, 32), (1, 64, 64), (33, 16, 16)])
def test_exact_attention_in_one_launch(ratio: int, k_size: int, v_size: int) -> None:
    forms.fused_attention_is_exact(CPU, ratio, k_size, v_size)


FEW_FORMS = {
    ("pages of 1", "decode"), ("pages of 24", "several"), ("pages of 64", "decode"),
    ("packed in pages", "several"), ("packed in pages", "prefill"), ("listed in pages", "decode"),
}  # fmt: skip
EVERY_FORM = [
    pytest.param(form, path, marks=() if (form, path) in FEW_FORMS else pytest.mark.slow)
    for form in forms.FORMS
    for path in ("decode", "several", "prefill")
]


@pytest.mark.parametrize(("form", "path"), EVERY_FORM)
def test_a_form_changes_no_bit(form: str, path: str) -> None:
    forms.a_form_changes_no_bit(form, path, CPU, ("window",) if path == "decode" else ("gaussian",))


LAWS_OF_FORMS: dict[str, Callable[[], None]] = {
    "mask of causal": lambda: forms.a_mask_that_says_causal_is_causal("several", CPU),
    "any mask": lambda: forms.any_mask_is_within_the_budget(CPU, ("several",)),
    "any list": lambda: forms.any_list_is_within_the_budget(CPU, ("window",)),
    "rows alone": lambda: forms.rows_are_rows_alone("several", CPU, ("gaussian",)),
    "rows of decode alone": lambda: forms.rows_are_rows_alone("decode", CPU, ("gaussian",)),
    "sequence alone": lambda: forms.a_sequence_alone_is_the_sequence_in_its_batch(CPU),
}


@pytest.mark.parametrize("law", LAWS_OF_FORMS)
def test_law_of_forms(law: str) -> None:
    LAWS_OF_FORMS[law]()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_laws_of_forms_in_every_case() -> None:
    every = ("decode", "several", "prefill")
    for path in every:
        forms.a_mask_that_says_causal_is_causal(path, CPU)
    forms.any_mask_is_within_the_budget(CPU, every)
    forms.any_list_is_within_the_budget(CPU, ("window", "alibi", "sinks"))
    for path in ("several", "decode"):
        forms.rows_are_rows_alone(path, CPU, forms.ROW_FAMILIES)


@pytest.mark.parametrize("path", ["several", pytest.param("prefill", marks=pytest.mark.slow)])
def test_chunks_of_packed_rows_change_no_bit(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forms.chunks_of_packed_rows_change_no_bit(path, CPU, monkeypatch)


# Reading every cache key by key takes the interpreter more than five minutes: the slow tests do it, and
# tests/cuda in seconds. Of forms there are `forms`' own laws above.
AT_ONCE = [law for law in LAWS.values() if law.name != "cache-read-back" and law.group != "forms"]


@pytest.mark.parametrize("law", AT_ONCE, ids=lambda law: law.name)
def test_keeps_the_law(law: Law) -> None:
    # The first case is the simplest there is. Small ones have several tiles and parts too.
    keeps(law, examples=4, small=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("law", LAWS.values(), ids=lambda law: law.name)
def test_keeps_the_law_in_more_cases(law: Law) -> None:
    keeps(law, examples=30)


def keeps(law: Law, examples: int, *, small: bool = False) -> None:
    subject = flash_subject()
    subject.small = small
    result = run_law(law, subject, examples=examples, shrink=False)
    assert result.state == "holds", f"{result.reason}: {result.case}"


def test_chunks_of_rows_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    laws.chunks_of_rows_change_no_bit(CPU, monkeypatch)


def _write_bounds(out, n_kv, parts, tiles_a_part, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    part = tl.program_id(0)
    first, end, count = tile_rows.part_bounds(n_kv, part, parts, tiles_a_part, BLOCK)
    tl.store(out + 3 * part, first)
    tl.store(out + 3 * part + 1, end)
    tl.store(out + 3 * part + 2, count)


def _write_tanh(x, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, SIZE)
    tl.store(out + i, tile_arithmetic.tanh(tl.load(x + i)))


def test_tanh_is_as_exact_as_the_arithmetic_says() -> None:
    x = torch.cat((torch.logspace(-8, 2, 3000), torch.linspace(0.2, 0.3, 1096)))
    x = torch.where(torch.arange(4096) % 2 == 0, x, -x)
    found = torch.empty_like(x)
    triton.jit(_write_tanh)[(1,)](x, found, SIZE=4096)
    exact = torch.tanh(x.double())
    relative = float(((found.double() - exact) / exact).abs().max())
    # The device's exponential is less exact than the interpreter's: some room is left for it.
    assert relative <= U_TANH / 2, relative


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("kv", ["1", "4", "33", "size:64", "size:200", "size:4096", "auto"])
def test_cuts_on_the_device_are_those_of_the_plan(kv: str, block: int) -> None:
    write_bounds = triton.jit(_write_bounds)
    cuts = KVCuts.parse(kv)
    parts = cuts.parts_wanted(1, 132) if cuts.mode != "size" else 0
    tiles_a_part = -(-cuts.value // block) if cuts.mode == "size" else 0
    lengths = (0, 1, block - 1, block, block + 1, 3 * block, 1000)
    if cuts.mode == "auto":
        tiles_a_part, lengths = -cuts.tiles_to_fill, (*lengths, 70 * block, 200 * block, 700 * block)
    for n_kv in lengths:
        expected = cuts.cuts(n_kv, block, 1, 132)
        n_parts = max(len(expected) - 1, 1)
        found = torch.full((n_parts, 3), -1, dtype=torch.int32)
        write_bounds[(n_parts,)](found, n_kv, parts, tiles_a_part, BLOCK=block)
        assert found[:, 2].tolist() == [n_parts] * n_parts
        assert sorted(set(found[:, :2].flatten().tolist())) == list(expected)
        assert found[1:, 0].tolist() == found[:-1, 1].tolist()


def test_the_laws_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that never shows its rows the last key of a part breaks them."""
    right = flash_device.part_bounds

    def short(n_kv, part, parts, tiles_a_part, BLOCK):  # type: ignore[no-untyped-def]
        first, end, count = right(n_kv, part, parts, tiles_a_part, BLOCK)
        return first, end - 1, count

    monkeypatch.setattr(flash_device, "part_bounds", short)
    with pytest.raises(AssertionError, match="times the tolerance"):
        laws.agrees_with_exact(laws.Case("dropped", lengths=[[200]]), CPU)


@pytest.mark.parametrize("spoil", [pytest.param("device", marks=pytest.mark.slow), "plan"])
def test_a_plan_that_did_not_run_is_not_what_it_says(
    spoil: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counting.a_plan_that_did_not_run_is_not_what_it_says(spoil, CPU, monkeypatch, tmp_path)


def test_parts_that_begin_elsewhere_are_not_the_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counting.parts_that_begin_elsewhere_are_not_the_plan(CPU, monkeypatch, tmp_path)


def test_the_first_of_like_calls_is_counted_and_a_sample_after(monkeypatch: pytest.MonkeyPatch) -> None:
    counting.the_first_of_like_calls_is_counted_and_a_sample_after(CPU, monkeypatch)


def test_of_the_largest_calls_the_first_sequences_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counting.of_the_largest_calls_the_first_sequences_are_counted(CPU, monkeypatch)


def test_what_is_not_launched_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    counting.what_is_not_launched_is_not_counted(CPU, monkeypatch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_size": 520, "v_size": 520}, "v: flash has head sizes 16 to 512 in steps of 8, got 520"),
        ({"k_size": 8}, "k: flash has head sizes 16 to 576 in steps of 8, got 8"),
        ({"k_size": 68}, "got 68"),
        ({"dtype": torch.float64}, "q: flash computes float16, bfloat16 and float32, got torch.float64"),
        ({"plan": Plan(heads=(2, 2))}, "heads=2+2: sums to 4, expected r = 3"),
        ({"ratio": 65, "kv_heads": 1}, "heads=65: flash has groups of at most 64 heads"),
    ],
)
def test_refuses_what_it_does_not_have(change: dict[str, object], message: str) -> None:
    case = laws.Case("bad", **change)
    x = laws.inputs(case, CPU)
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        laws.kernel(case).attend(x.q, x.k, x.v, **x.more)


def test_without_cuda_flash_is_eager_and_says_so() -> None:
    flash = build_kernel("flash:heads=2+1,kv=2")
    assert flash.notes == [f"{FALLBACK_NOTE} (no CUDA device)"]
    assert why_not_flash() == "no CUDA device"
    x = laws.inputs(laws.Case("eager"), CPU)
    result = flash.attend(x.q, x.k, x.v, **x.more)
    assert {signature.kernel for _, _, signature in result.launched.rows} == {
        "eager[block=64,p=f16,acc=f32,out=f32]"
    }
    assert flash_kernel("flash", TileOptions()).spec == "flash"


def test_a_device_without_room_for_a_tile_falls_back_visibly(monkeypatch: pytest.MonkeyPatch) -> None:
    from verify.kernels.flash import kernel as flash

    monkeypatch.setattr(flash, "NOMINAL_LIMITS", flash.Limits(16_384, (8, 6)))
    case = laws.Case("small", 576, 512, 20, 1, [[65]])
    x = laws.inputs(case, CPU)
    kernel = laws.kernel(case)
    result = kernel.attend(x.q, x.k, x.v, **x.more)
    assert kernel.notes == [
        f"{FALLBACK_NOTE} (no tile of head sizes 576 and 512 fits in 16384 bytes of shared memory)"
    ]
    assert [signature.kernel[:5] for _, _, signature in result.launched.rows] == ["eager"]


def test_a_smaller_tile_keeps_the_cuts_and_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    from verify.kernels.flash import kernel as flash

    monkeypatch.setattr(flash, "NOMINAL_LIMITS", flash.Limits(40_000, (8, 6)))
    case = laws.Case("smaller", 256, 256, 4, 1, [[200]], plan=Plan(kv=KVCuts("parts", 2)))
    x = laws.inputs(case, CPU)
    kernel = laws.kernel(case)
    ((_, _, signature),) = kernel.attend(x.q, x.k, x.v, **x.more).launched.rows
    assert signature.kernel == "flash[block=64,p=f32,acc=f32,out=f32,tile=16]"
    assert signature.cuts == (0, 128, 200)
    shape = checked_call(x.q, x.k, x.v, **x.more).shape
    assert kernel.arithmetic(shape, "decode").block == 16
    assert kernel.arithmetic(shape, "decode").depths(200).tiles == 8
    laws.agrees_with_exact(case, CPU)


def test_arithmetic_is_that_of_tensor_cores() -> None:
    kernel = FlashKernel("flash", TileOptions(plan=Plan(kv=KVCuts("parts", 4))))
    x = laws.inputs(laws.Case("arithmetic"), CPU)
    arithmetic = kernel.arithmetic(checked_call(x.q, x.k, x.v, **x.more).shape, "decode")
    assert (arithmetic.u, arithmetic.p, arithmetic.acc) == (2.0**-23, "f16", "f32")
    depths = arithmetic.depths(1024)
    assert (depths.parts, depths.tiles, depths.d_l, depths.d_m) == (4, 4, 72, 7)
