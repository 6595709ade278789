"""Whole windows put to a kernel in calls of another form: which these are, and that it gives the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch

from verify.kernels.bits import same_bits
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import Call, Result, checked_call
from verify.kernels.capabilities import Capabilities
from verify.kernels.eager import EagerKernel
from verify.kernels.errors import KernelFailure
from verify.kernels.exact import exact_attention
from verify.kernels.formed import CallForm, FormedKernel, in_form
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel
from verify.kernels.trace import LaunchTrace

FORMS = [
    CallForm(n_q=4),
    CallForm(n_q=3, page=8),
    CallForm(n_q=4, sequences=2),
    CallForm(n_q=3, page=16, sequences=3),
    CallForm(page=16),
    CallForm(sequences=2),
]


def windows(batch: int = 3, rows: int = 23, *, ratio: int = 3, before: int = 0, size: int = 16) -> Call:
    """Whole windows, each row as if alone; before: keys of a prompt, that every row sees."""
    draw = torch.Generator().manual_seed(5)
    q, k, v = (
        torch.randn(batch, n, heads, size, generator=draw).half()
        for n, heads in ((rows, 2 * ratio), (before + rows, 2), (before + rows, 2))
    )
    kv_len = (before + 1 + torch.arange(rows, dtype=torch.int32)).expand(batch, -1).contiguous()
    return checked_call(q, k, v, kv_len=kv_len, scale=0.25)


def asked_of(kernel: FormedKernel, call: Call, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls that its inner kernel is asked, if it is not one that steps lie side by side for."""
    monkeypatch.setattr(kernel.inner, "as_if_alone", False)
    return all_asked_of(kernel, call, monkeypatch)


def all_asked_of(kernel: FormedKernel, call: Call, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The calls that its inner kernel is asked."""
    found: list[Call] = []
    run = kernel.inner.run

    def noting(one: Call) -> Result:
        found.append(one.checked())
        return run(one)

    monkeypatch.setattr(kernel.inner, "run", noting)
    kernel.run(call)
    return found


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("spec", ["eager:block=16,kv=2", "eager:heads=split,block=16"])
def test_a_right_kernel_gives_the_same_bits_in_every_form(form: CallForm, spec: str) -> None:
    call, kernel = windows(), build_kernel(spec)
    plain, formed = kernel.run(call), in_form(kernel, form).run(call)
    assert same_bits(formed.out, plain.out) and same_bits(formed.lse, plain.lse)
    assert sum(formed.launched.rows.values()) == call.kv_len.numel()


STEPS = [CallForm(n_q=4), CallForm(n_q=3, page=8), CallForm(one_by_one=True), CallForm(n_q=2)]


@pytest.mark.parametrize("form", STEPS, ids=str)
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("several_calls", [False, True])
def test_steps_side_by_side_are_the_steps_one_by_one(
    form: CallForm, listed: bool, several_calls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits, what ran, and the keys that each step is given; of windows of unlike length too."""
    call = windows(before=9)
    lengths = call.kv_len - torch.tensor([[0], [4], [0]])
    keys = torch.arange(32).expand(3, 23, -1).flip(-1)
    keys = torch.where(keys < lengths[..., None], keys, -1).int().contiguous() if listed else None
    call = replace(call, kv_len=lengths.int(), keys=keys).checked()
    monkeypatch.setattr("verify.kernels.formed.N_KV_PADDING", 8)
    if several_calls:
        monkeypatch.setattr("verify.kernels.formed._NUMBERS_AT_ONCE", 1)
    kernel = FormedKernel(build_kernel("eager:block=16,kv=2"), form)
    together = list(all_asked_of(kernel, call, monkeypatch))
    found = kernel.run(call)
    apart = list(asked_of(kernel, call, monkeypatch))
    due = kernel.run(call)
    assert same_bits(found.out, due.out) and same_bits(found.lse, due.lse)
    assert found.launched.rows == due.launched.rows
    assert len(together) == len(apart) if several_calls else len(together) < len(apart)
    steps = [one for one in together if one.kv_len.shape[1] == form.n_q]
    assert all(one.told_sequences == 1 and one.path == apart[-1].path for one in together)
    due_steps = [one for one in apart if one.kv_len.shape[1] == form.n_q]
    assert torch.cat([one.kv_len for one in steps]).equal(torch.cat([one.kv_len for one in due_steps]))
    assert all(one.k.stride(0) == 0 or form.page or len(one.k) == 1 for one in steps), "keys were copied"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_row_is_asked_once_with_its_own_keys(form: CallForm, monkeypatch: pytest.MonkeyPatch) -> None:
    call = windows(before=9)
    monkeypatch.setattr("verify.kernels.formed.N_KV_PADDING", 8)
    kernel = FormedKernel(build_kernel("eager:block=16"), form)
    asked = asked_of(kernel, call, monkeypatch)
    assert sorted(chain(*(one.kv_len.flatten().tolist() for one in asked))) == sorted(
        call.kv_len.flatten().tolist()
    )
    in_steps = form.n_q > 1 or form.sequences > 1
    assert {one.path for one in asked} == {"several" if form.n_q > 1 else "decode"}
    # 23 rows: those that are left over come first, in a call of their own.
    left = 23 % form.n_q
    tokens = {one.q.shape[1] for one in asked}
    assert tokens == ({form.n_q, left} - {0} if in_steps else {23})
    assert max(one.q.shape[0] for one in asked) == (form.sequences if in_steps else 3)
    for one in asked:
        longest = one.kv_len.amax(1).tolist()
        # A sequence of a call sees fewer keys than the one beside it.
        alike = not in_steps or one.q.shape[1] != form.n_q
        assert alike or len(set(longest)) == len(longest)
        if form.page:
            assert one.block_table is not None and one.k.shape[1] == form.page
            needed = -(-one.kv_len.amax(1, keepdim=True) // form.page)
            behind = torch.arange(one.block_table.shape[1]) >= needed
            assert set(one.block_table[behind].tolist()) <= {-1, 2**31 - 1, 0}
        elif form.n_q > 1:
            # An engine's cache, of which there is so much at that place, in steps of its padding.
            assert one.k.shape[1] == -(-max(longest) // 8) * 8


def test_what_ran_says_tokens_pages_and_sequences() -> None:
    kernel = in_form(build_kernel("eager:block=16"), CallForm(n_q=4, page=8, sequences=2))
    launched = kernel.run(windows()).launched
    kinds = {(path, s.tokens, s.page, s.sequences) for path, _, s in launched.rows}
    # Three windows: two together, and one alone; 23 rows: three, and five times four.
    assert kinds == {("several", n, 8, b) for n in (3, 4) for b in (1, 2)}
    lines = [line.to_json() for line in LaunchTrace([launched]).coverage()]
    assert {(x["path"], x["tokens_a_call"], x["page"], x["sequences"]) for x in lines} == kinds


@pytest.mark.parametrize("page", [0, 8])
def test_a_prefill_of_sequences_is_two_calls_of_unlike_pieces(
    page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = replace(windows(4, before=2), path="prefill")
    kernel = FormedKernel(build_kernel("eager:block=16"), CallForm(page=page, sequences=3))
    result = kernel.run(call)
    assert float((result.out.double() - exact_attention(call).out).abs().max()) < 1e-3
    assert sum(result.launched.rows.values()) == call.kv_len.numel()
    assert {(path, s.page, s.sequences) for path, _, s in result.launched.rows} == {
        ("prefill", page, 3), ("prefill", page, 1)
    }  # fmt: skip
    asked = asked_of(kernel, call, monkeypatch)
    pieces = [one.cu_seqlens.diff().tolist() for one in asked if one.cu_seqlens is not None]
    # Three windows of 23 rows are cut at a quarter, the half and three quarters; the one left at the half.
    assert pieces == [[5, 11, 17], [18, 12, 6], [11], [12]]
    first = asked[0].kv_len[0].tolist()
    assert [first[4], first[5], first[15], first[16]] == [7, 3, 13, 3]
    if page:
        # Five rows after two keys see seven: one page of eight.
        assert asked[0].block_table is not None
        assert (asked[0].block_table[0, 1:] == torch.tensor([2**31 - 1, 0, -1, 2**31 - 1])).all()
    assert kernel.refuses(call) is None
    assert in_form(build_kernel("sdpa:math"), kernel.form).refuses(call) is not None


def test_a_policy_is_told_of_the_sequences_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp has its vector kernel, a head at a time, for one sequence alone."""
    call, kernel = windows(ratio=4, size=64), build_kernel("eager:policy=mainline-2026-10")

    def groups(of: Kernel) -> set[tuple[int, ...]]:
        return {s.head_groups for _, _, s in of.run(call).launched.rows}

    assert groups(kernel) == {(1, 1, 1, 1)}
    together = in_form(kernel, CallForm(sequences=3))
    assert groups(together) == {(4,)}
    told: list[int] = []
    arithmetic_of = EagerKernel.arithmetic_of

    def noting(of: EagerKernel, one: Call) -> Arithmetic:
        told.append(one.told_sequences)
        return arithmetic_of(of, one)

    monkeypatch.setattr(EagerKernel, "arithmetic_of", noting)
    together.arithmetic_of(call)
    assert told == [3]
    # Of three windows by twos the last is alone.
    assert groups(in_form(kernel, CallForm(sequences=2))) == {(4,), (1, 1, 1, 1)}


def test_some_tokens_go_by_prefill_where_a_kernel_has_no_other_path(monkeypatch: pytest.MonkeyPatch) -> None:
    call = windows(1)
    kernel = in_form(build_kernel("sdpa:math"), CallForm(n_q=4))
    assert isinstance(kernel, FormedKernel)
    result = kernel.run(call)
    assert float((result.out.double() - exact_attention(call).out).abs().max()) < 1e-3
    # What windows are made of it is called by what it is asked for.
    assert {path for path, _, _ in result.launched.rows} == {"several"}
    assert {one.path for one in asked_of(kernel, call, monkeypatch)} == {"prefill"}


def test_what_a_kernel_has_not_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = in_form(build_kernel("eager"), CallForm(page=16))
    assert kernel.refuses(windows()) is None
    monkeypatch.setattr(EagerKernel, "capabilities", lambda self: Capabilities())
    assert kernel.refuses(windows()) == "takes no pages"
    with pytest.raises(KernelFailure, match="takes no pages"):
        in_form(build_kernel("sdpa:math"), CallForm(page=16)).run(windows())
    with pytest.raises(ValueError, match="n_q: expected 1 to 16 query tokens a call, got 17"):
        in_form(kernel, CallForm(n_q=17))


def test_its_arithmetic_is_that_of_the_calls_that_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    # A policy splits 12 heads for one token alone.
    call = windows(1, ratio=12)
    kernel = build_kernel("eager:policy=ik-1183,threshold=1,kv=2,block=16")
    assert {s.head_groups for _, _, s in kernel.run(call).launched.rows} == {(8, 4)}
    formed = in_form(kernel, CallForm(n_q=4))
    assert {s.head_groups for _, _, s in formed.run(call).launched.rows} == {(4, 4, 4)}
    asked: list[tuple[str, list[list[int]]]] = []
    arithmetic_of = EagerKernel.arithmetic_of

    def noting(of: EagerKernel, one: Call) -> Arithmetic:
        asked.append((one.path, one.kv_len.tolist()))
        return arithmetic_of(of, one)

    monkeypatch.setattr(EagerKernel, "arithmetic_of", noting)
    formed.arithmetic_of(call)
    assert asked == [("several", [[20, 21, 22, 23]])]


@pytest.mark.parametrize(("word", "told"), [("", "prefill"), ("SEVERAL = 'several'\n", "several")])
def test_a_function_of_two_words_is_told_of_some_tokens_as_of_a_prompt(
    tmp_path: Path, word: str, told: str
) -> None:
    (tmp_path / "mine.py").write_text(
        f"{word}def attend(q, k, v, *, kv_len, scale, path):\n"
        "    return q.new_full((*q.shape[:3], v.shape[3]), float(ord(path[0])))\n"
    )
    kernel = build_kernel(f"py:{tmp_path}/mine.py::attend")
    try:
        out = in_form(kernel, CallForm(n_q=4)).run(windows(1)).out
    finally:
        kernel.close()
    assert float(out.max()) == float(out.min()) == ord(told[0])
