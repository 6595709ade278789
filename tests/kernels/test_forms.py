"""Forms of one right kernel: each is called as it wants to be, and what it lacks is said."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from support.mypkg import ops
from support.named import named
from verify.kernels.call import Call, checked_call
from verify.kernels.errors import KernelFailure, SpecError
from verify.kernels.exact import exact_attention
from verify.kernels.foreign.forms import Wanted
from verify.kernels.foreign.function_kernel import FunctionKernel
from verify.kernels.foreign.python_kernel import parse_target
from verify.kernels.heads import Heads
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.other_forms import in_pages, listed, masked, packed
from verify.kernels.judging.probes import check, standard_probes
from verify.kernels.kernel import Kernel
from verify.kernels.plans.spec import parse_spec
from verify.kernels.registry import build_kernel

SUPPORT = Path(__file__).parents[1] / "support"
OPS = SUPPORT / "mypkg/ops.py"


def heads_of(ratio: int) -> Heads:
    return Heads.grouped(kv=2, ratio=ratio, k_size=32, v_size=32)


def decode(ratio: int = 2, dtype: torch.dtype = torch.float16, batch: int = 2) -> Call:
    sizes = InputSizes(n_kv=(40, 40, 33), batch=batch, heads=heads_of(ratio), dtype=dtype, edges=())
    return draw("gaussian", sizes, 0)


def prefill(dtype: torch.dtype = torch.float16) -> Call:
    sizes = InputSizes(n_kv=(38, 39, 40), batch=2, heads=heads_of(2), path="prefill", dtype=dtype, edges=())
    return draw("gaussian", sizes, 0)


def is_right(kernel: Kernel, call: Call) -> bool:
    result = kernel.run(call)
    kernel.close()
    return bool((result.out - exact_attention(call).out).abs().max() < 2e-3)


LENGTHS_ARE_TOLD = [ops.attend, ops.Ops.attend, ops.Attn(64), ops.Attn(64).decode, ops.layer]


@pytest.mark.parametrize("function", [*LENGTHS_ARE_TOLD, lambda q, k, v, *, kv_len, scale: ops.attend(
    q, k, v, kv_len=kv_len, scale=scale)], ids=named)  # fmt: skip
def test_one_that_takes_what_the_contract_gives_is_not_asked(function: Any) -> None:
    kernel = FunctionKernel(function)
    assert not kernel.notes and is_right(kernel, decode()) and is_right(kernel, prefill())


@pytest.mark.parametrize(
    ("function", "way", "layout", "said"),
    [
        (ops.dense, "none", "bshd", "mask=none"),
        (ops.causal, "causal", "bshd", "last row sees the last key"),
        (ops.square, "none", "bhsd", "layout=bhsd"),
        (ops.takes_a_mask, "mask", "bshd", "is given attn_mask"),
        (F.scaled_dot_product_attention, "mask", "bhsd", "a mask of the keys"),
        (torch.compile(ops.dense, backend="eager"), "none", "bshd", "mask=none"),
    ],
    ids=named,
)
def test_one_without_lengths_is_asked_how_it_sees_keys(
    function: Any, way: str, layout: str, said: str
) -> None:
    kernel = FunctionKernel(function)
    assert (kernel.form.way, kernel.form.layout) == (way, layout)
    assert said in " ".join(kernel.notes)
    assert is_right(kernel, decode()) and is_right(kernel, prefill())


def test_a_triangle_of_as_many_rows_as_keys_is_asked_for_prefills_alone() -> None:
    kernel = FunctionKernel(ops.square, wanted=Wanted(mask="causal", layout="bhsd"))
    assert kernel.form.way == "square" and kernel.capabilities().paths == ("prefill",)
    assert is_right(kernel, prefill()) and "prefill alone" in " ".join(kernel.notes)
    with pytest.raises(KernelFailure, match="as many rows as keys") as failed:
        kernel.run(decode())
    assert failed.value.kind == "unsupported"


def test_what_is_said_needs_no_asking() -> None:
    assert is_right(FunctionKernel(ops.heads_first, wanted=Wanted(layout="bhsd")), decode())
    assert is_right(FunctionKernel(ops.needs_block, wanted=Wanted(options={"block": 64})), decode())
    kernel = FunctionKernel(ops.bf16_only, wanted=Wanted(dtype="bf16"))
    assert is_right(kernel, decode(dtype=torch.bfloat16)) and kernel.capabilities().dtypes == ("bfloat16",)
    with pytest.raises(KernelFailure, match="takes bfloat16, not float16"):
        kernel.run(decode())


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_packed_tokens_are_given_their_bounds(mask: str) -> None:
    kernel = FunctionKernel(ops.packed, wanted=Wanted(mask=mask))
    assert kernel.form.layout == "thd"
    assert is_right(kernel, decode()) and is_right(kernel, prefill())


@pytest.mark.parametrize(
    ("kv_len", "bounds"),
    [
        ([[3, 4, 5], [7, 8, 9]], [([0, 3, 6], [0, 5, 14], 3, 9, True)]),
        # What is no triangle goes a row at a time, of both sequences together.
        ([[5, 4], [0, 9]], [([0, 1, 2], [0, 5, 14], 1, 9, False), ([0, 1], [0, 4], 1, 4, False)]),
        # A triangle is asked after rows that see all keys.
        ([[2, 3], [5, 9]], [
            ([0, 1], [0, 5], 1, 5, False), ([0, 1], [0, 9], 1, 9, False), ([0, 2], [0, 3], 2, 3, True),
        ]),
    ],
)  # fmt: skip
def test_keys_of_several_sequences_are_packed_in_one_call(
    kv_len: list[list[int]], bounds: list[tuple[Any, ...]]
) -> None:
    asked: list[tuple[Any, ...]] = []

    def noting(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal=False):
        ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        asked.append((*ends, max_seqlen_q, max_seqlen_k, causal))
        return ops.packed(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal
        )

    kernel = FunctionKernel(noting, wanted=Wanted(mask="causal"))
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, 2, 16, generator=generator) for n in (len(kv_len[0]), 9, 9))
    call = checked_call(q, k, v, kv_len=torch.tensor(kv_len, dtype=torch.int32), scale=0.25, path="prefill")
    asked.clear()
    assert is_right(kernel, call)
    assert asked == bounds


def test_one_without_shared_heads_is_asked_for_a_ratio_of_one() -> None:
    kernel = FunctionKernel(ops.no_shared_heads)
    assert kernel.capabilities().ratios == (1,) and is_right(kernel, decode(ratio=1))
    with pytest.raises(KernelFailure, match="as many KV heads"):
        kernel.run(decode())


def test_another_order_of_dimensions_is_named_where_it_is_met() -> None:
    with pytest.raises(KernelFailure, match="what layout=bhsd has"):
        FunctionKernel(lambda q, k, v, *, kv_len, scale: q.transpose(1, 2)).run(decode())


@pytest.mark.parametrize(
    ("function", "wanted", "said"),
    [
        (ops.Attn, Wanted(), "is a class: expected an object"),
        (3, Wanted(), "expected something that can be called, got a int"),
        (ops.needs_block, Wanted(), "block=VALUE"),
        (ops.needs_block, Wanted(options={"blok": 64}), "did you mean 'block'"),
        (ops.attend, Wanted(layout="sbhd"), "layout=sbhd, expected one of bshd, bhsd, thd"),
        (lambda q, k, v: 1 / 0, Wanted(), "fails when it is asked how it sees keys: ZeroDivisionError"),
    ],
    ids=named,
)
def test_what_cannot_be_called_is_refused_in_one_line(function: Any, wanted: Wanted, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        FunctionKernel(function, wanted=wanted)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_one_is_not_taken_for_another_form() -> None:
    """It is no triangle, and not right in any order: it runs as it stands, and is judged."""
    kernel = FunctionKernel(lambda q, k, v: ops.dense(q, k, v) * 1.5)
    assert not is_right(kernel, decode())


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("raised", lambda q, k, v, *, kv_len, scale: 1 / 0),
        ("raised", lambda q, k, v, *, kv_len, scale: sys.exit(3)),
        ("shape", lambda q, k, v, *, kv_len, scale: q[:, :1]),
        ("shape", lambda q, k, v, *, kv_len, scale: "attention"),
        ("dtype", lambda q, k, v, *, kv_len, scale: q.int()),
        ("wrote-inputs", lambda q, k, v, *, kv_len, scale: q.add_(1)),
    ],
)
def test_what_goes_wrong_in_this_process_is_a_finding(kind: str, function: Any) -> None:
    call = decode()
    before = call.q.clone()
    with pytest.raises(KernelFailure) as failed:
        FunctionKernel(function).run(call)
    assert failed.value.kind == kind
    assert torch.equal(call.q, before)


@pytest.mark.parametrize(
    "target",
    [
        f"{OPS}::attend",
        f"{OPS}::Ops.attend",
        f"{OPS}::Attn(block=64, name='a,b')",
        f"{OPS}::Attn(block=64).decode,acc=f32",
        f"{OPS}::needs_block,block=64",
        "mypkg.ops::layer",
    ],
)
def test_a_specification_says_the_same(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By file in a package, by module's name from the current folder; classes, static methods, options."""
    monkeypatch.chdir(SUPPORT)
    kernel = build_kernel(f"py:{target}")
    assert kernel.binary and is_right(kernel, decode())  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (f"{OPS}::Attn", "Attn must be constructed"),
        (f"{OPS}::attend(block=64)", "is no class"),
        (f"{OPS}::atend", "did you mean attend?"),
        (f"{OPS}::attend,blok=64", "has no option 'blok'"),
        ("no.such::thing", "does not import: ModuleNotFoundError"),
    ],
)
def test_a_specification_that_names_nothing_is_refused(target: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        build_kernel(f"py:{target}")
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["py:a.py::f(1)", "py:a.py", "py:a.py::Attn(block=x)", "py:a.py::1f"])
def test_a_target_that_cannot_be_read(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text("")
    with pytest.raises(SpecError, match="expected"):
        parse_target(parse_spec(text))


def test_attention_of_transformers() -> None:
    pytest.importorskip("transformers")
    for name in ("sdpa", "eager"):
        assert is_right(build_kernel(f"hf:{name}"), decode())
    with pytest.raises(SpecError, match="did you mean 'sdpa'"):
        build_kernel("hf:sdp")


def test_a_kernel_of_the_hub_comes_through_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself is not installed here: a module of its name stands for it."""
    if "kernels" not in sys.modules:
        with pytest.raises(SpecError, match="kernels is not installed"):
            build_kernel("hub:org/attention::attend")
    library = ModuleType("kernels")
    library.__spec__ = torch.__spec__
    asked = []

    def get_kernel(name: str) -> ModuleType:
        asked.append(name)
        return ops

    library.get_kernel = get_kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", library)
    assert is_right(build_kernel("hub:org/attention::needs_block,block=64"), decode())
    assert asked == ["org/attention"]
    for text, said in (("hub:attention::attend", "expected hub:ORG/NAME"), ("hub:o/a::atend", "'attend'")):
        with pytest.raises(SpecError, match=said):
            build_kernel(text)


def as_engines(form: str) -> Call:
    """A call of three sequences in a form of `docs/contract.md`."""
    sizes = InputSizes(n_kv=(40, 33, 7), batch=3, heads=heads_of(2), path="several", edges=())
    call = draw("gaussian", sizes, 3)
    if form == "numbers":
        return replace(call, mask=torch.randn(1, 4, 3, call.shape.keys))
    return {
        "plain": lambda: call,
        "block_table": lambda: in_pages(call, 8),
        "cu_seqlens": lambda: packed(call, [2, 0, 3]),
        "mask": lambda: masked(call),
        "keys": lambda: listed(call, order=1, most=9),
    }[form]()


@pytest.mark.parametrize(
    ("function", "takes"),
    [
        (ops.attend, ("plain",)),
        (ops.paged, ("plain", "block_table")),
        (ops.varlen, ("plain", "cu_seqlens")),
        (ops.any_mask, ("plain", "mask", "numbers", "keys")),
        (ops.says_nothing, ("plain", "block_table", "mask", "numbers")),
        (ops.takes_a_mask, ("plain", "mask")),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_one_is_given_the_forms_of_a_call_that_it_takes(function: Any, takes: tuple[str, ...]) -> None:
    kernel = FunctionKernel(function)
    for form in ("plain", "block_table", "cu_seqlens", "mask", "numbers", "keys"):
        call = as_engines(form)
        if form in takes:
            result, exact = kernel.run(call), exact_attention(call)
            assert result.out.shape == exact.out.shape, form
            assert (result.out - exact.out).abs().max() < 2e-3, form
        elif not (form == "numbers" and "mask" in takes):
            with pytest.raises(KernelFailure, match="takes no") as failed:
                kernel.run(call)
            assert failed.value.kind == "unsupported"


def test_one_that_cannot_do_without_a_form_is_given_every_call_so() -> None:
    kernel = FunctionKernel(ops.paged)
    assert "takes block_table alone: every call is given so" in " ".join(kernel.notes)
    assert is_right(kernel, decode()) and is_right(kernel, prefill())
    assert not failed_probes(kernel) and not failed_probes(FunctionKernel(ops.varlen))
    wrong = FunctionKernel(lambda q, k, v, block_table, *, kv_len, scale: ops.paged(
        q, k, v, block_table.flip(1), kv_len=kv_len, scale=scale))  # fmt: skip
    assert failed_probes(wrong)


def failed_probes(kernel: Kernel) -> list[str]:
    """Names of the probes that a kernel without an lse fails, rows without keys left aside."""
    sizes = InputSizes(n_kv=(70, 40), heads=heads_of(2), edges=(64,))
    has = kernel.capabilities()
    probes = [p for p in standard_probes(sizes) if not has.refuses(p.call) and "empty" not in p.name]
    assert len(probes) > 4
    return [p.name for p in probes if any(failure.what != "lse" for failure in check(p, kernel))]


def test_forms_cross_into_another_process() -> None:
    for name, forms in (("paged", ("block_table",)), ("any_mask", ("mask", "numbers", "keys"))):
        kernel = build_kernel(f"py:{OPS}::{name}")
        for form in forms:
            call = as_engines(form)
            assert (kernel.run(call).out - exact_attention(call).out).abs().max() < 2e-3, form
        kernel.close()


def test_pages_without_lengths_are_no_kernel_of_ours() -> None:
    with pytest.raises(SpecError, match="takes block_table, and no kv_len"):
        FunctionKernel(lambda q, k, v, block_table, scale: q)
