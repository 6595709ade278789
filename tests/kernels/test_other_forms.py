"""The same call in another form has the same answer: to the bit where the same sums are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from verify.kernels.bits import same_bits
from verify.kernels.call import Call, Result, checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.faults.altered import AlteredKernel, next_heads_keys
from verify.kernels.heads import Heads
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.other_forms import in_pages, listed, masked, packed
from verify.kernels.judging.probes import check, standard_probes
from verify.kernels.registry import build_kernel

SIZES = InputSizes(n_kv=(130, 64, 0, 65), batch=2, heads=Heads.grouped(kv=2, ratio=3, k_size=32, v_size=32))
ROWS = 4


def same(a: Result, b: Result) -> bool:
    return same_bits(a.out, b.out) and same_bits(a.lse, b.lse)


def apart(result: Result) -> Result:
    """Packed rows as rows of the batch."""
    return Result(
        result.out[0].unflatten(0, (-1, ROWS)), result.lse[0].unflatten(0, (-1, ROWS)), result.launched
    )


FORMS: dict[str, Callable[[Call], Call]] = {
    "pages of 1": lambda c: in_pages(c, 1),
    "pages of 16": lambda c: in_pages(c, 16),
    "pages of 256": lambda c: in_pages(c, 256, seed=5),
    "packed": packed,
    "packed in pages": lambda c: packed(in_pages(c, 16, seed=2)),
    "listed in order": listed,
}


@pytest.mark.parametrize("path", ["decode", "several"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["gaussian", "window", "alibi", "sinks"])
def test_a_form_changes_no_bit(family: str, form: str, path: str) -> None:
    call = draw(family, replace(SIZES, path=path), 1)
    other = FORMS[form](call)
    for spec in ("eager:kv=3", "eager:heads=2+1,kv=2,acc=f16"):
        kernel = build_kernel(spec)
        plain, found = kernel.run(call), kernel.run(other)
        assert same(plain, apart(found) if "packed" in form else found), spec
        assert sorted(plain.launched.rows.values()) == sorted(found.launched.rows.values())


@pytest.mark.parametrize("numbers", [False, True])
def test_a_mask_that_says_causal_is_causal(numbers: bool) -> None:
    for family in ("gaussian", "window", "softcap"):
        call = draw(family, SIZES, 1)
        assert same(build_kernel("eager").run(call), build_kernel("eager").run(masked(call, numbers=numbers)))


def test_a_list_in_any_order_is_the_same_sum() -> None:
    call = draw("gaussian", SIZES, 1)
    other = listed(call, order=3)
    kernel = build_kernel("eager")
    plain, found, exact = kernel.run(call), kernel.run(other), exact_attention(other)
    assert not same(plain, found)
    assert (exact.out - exact_attention(call).out).abs().max() < 1e-13
    assert (found.out - exact.out).abs().max() < 2e-3


def test_the_few_that_are_listed_are_those_that_count() -> None:
    call = draw("gaussian", SIZES, 1)
    few = listed(call, order=1, most=20)
    assert int(few.n_kv.max()) <= 20
    # What nobody lists is not read.
    named = few.keys[0][few.keys[0] >= 0].unique().long()
    k, v = call.k.clone(), call.v.clone()
    unread = torch.ones(k.shape[1], dtype=torch.bool)
    unread[named] = False
    k[0, unread], v[0, unread] = float("nan"), float("nan")
    other, kernel = replace(few, k=k, v=v), build_kernel("eager")
    assert same(kernel.run(few), kernel.run(other))
    assert same_bits(exact_attention(few).out[:1], exact_attention(other).out[:1])


def test_a_shared_prefix_is_a_copied_one() -> None:
    call = draw("gaussian", SIZES, 1)
    for x in (call.k, call.v):
        x[1, :32] = x[0, :32]
    copied, shared = in_pages(call, 16), in_pages(call, 16, shared=2)
    assert not torch.equal(copied.block_table[0, :2], copied.block_table[1, :2])
    assert torch.equal(shared.block_table[0, :2], shared.block_table[1, :2])
    kernel = build_kernel("eager:kv=2")
    assert same(kernel.run(copied), kernel.run(shared))


def test_a_sequence_alone_is_the_sequence_in_its_batch() -> None:
    sizes = replace(SIZES, batch=3, path="several")
    call = in_pages(draw("gaussian", sizes, 2), 16)
    kernel = build_kernel("eager:kv=2")
    whole = kernel.run(packed(call, [2, 0, 4]))
    for b, rows, count in ((0, slice(0, 2), 2), (2, slice(2, 6), 4)):
        alone = checked_call(
            call.q[b : b + 1, :count], call.k, call.v, kv_len=call.kv_len[b : b + 1, :count],
            block_table=call.block_table[b : b + 1], scale=call.scale, path="several",
        )  # fmt: skip
        assert same_bits(kernel.run(alone).out[0], whole.out[0, rows])


def test_v_in_k_stays_in_pages() -> None:
    sizes = InputSizes(n_kv=(70, 3), heads=Heads(4, 1, 96, 64), v_in_k=True)
    call = draw("gaussian", sizes, 0)
    assert call.v_in_k == (0, 64)
    paged = in_pages(call, 16)
    assert paged.v_in_k == (0, 64)
    assert same(build_kernel("eager").run(call), build_kernel("eager").run(paged))


@pytest.mark.parametrize("form", ["pages of 16", "listed in order"])
def test_probes_are_asked_in_a_form(form: str) -> None:
    kernel = build_kernel("eager:kv=2")
    sizes = InputSizes(n_kv=(130, 64, 0), heads=Heads(4, 2, 64, 64), path="several")
    wrong = AlteredKernel("next heads", kernel, next_heads_keys)
    probes = [replace(probe, call=FORMS[form](probe.call)) for probe in standard_probes(sizes)]
    assert {probe.call.path for probe in probes} == {"several"}
    assert not [probe.name for probe in probes if check(probe, kernel)]
    assert any(check(probe, wrong) for probe in probes)


def test_what_cannot_be_made_is_said() -> None:
    call = draw("alibi", SIZES, 0)
    for wrong, said in (
        (lambda: masked(call), "without mask and ALiBi"),
        (lambda: in_pages(in_pages(call, 4), 4), "without pages"),
        (lambda: packed(packed(call)), "not packed"),
        (lambda: listed(listed(call)), "without lists"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
