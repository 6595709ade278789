"""Laws of the flash kernel over the forms of a call, on Triton's interpreter and on a GPU.

Calls are small: the interpreter takes tens of milliseconds a program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from verify.kernels.bits import same_bits
from verify.kernels.call import AttentionPath, Call, Result, checked_call
from verify.kernels.exact import reference_attention
from verify.kernels.exact_fused import fused_attention
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.heads import Heads
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.other_forms import in_pages, listed, masked, packed
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.trace import RowKind
from verify.laws.tolerance import against_exact

ROWS = 2
SIZES = InputSizes(
    n_kv=(130, 65), batch=2, fewer=(0, 66), heads=Heads.grouped(kv=2, ratio=2, k_size=16, v_size=16)
)
# Inputs whose masks and biases go by a row's own keys.
ROW_FAMILIES = ("gaussian", "window", "sinks", "alibi", "softcap")
TWO_PARTS = Plan(kv=KVCuts("parts", 2))

Form = Callable[[Call], Call]
# With tiles of 64 keys: pages of one key, of a part of a tile, of no part, of one tile, of several.
FORMS: dict[str, Form] = {
    "pages of 1": lambda c: in_pages(c, 1),
    "pages of 16": lambda c: in_pages(c, 16, seed=1),
    "pages of 24": lambda c: in_pages(c, 24, seed=2),
    "pages of 64": lambda c: in_pages(c, 64, seed=3),
    "pages of 256": lambda c: in_pages(c, 256, seed=4),
    "packed": packed,
    "packed in pages": lambda c: packed(in_pages(c, 16, seed=5)),
    "listed": listed,
    "listed in pages": lambda c: listed(in_pages(c, 16, seed=6)),
}


def flash(plan: Plan = TWO_PARTS) -> FlashKernel:
    return FlashKernel("flash", TileOptions(plan=plan))


def ran(call: Call, plan: Plan = TWO_PARTS) -> Result:
    """Its result; what the device wrote is the plan, or a note would say so."""
    kernel = flash(plan)
    found = kernel.run(call)
    assert kernel.notes == [], kernel.notes
    return found


def planned(result: Result) -> set[RowKind]:
    """What ran of each row. Binaries left aside: a GPU has one of its own for a single query token."""
    assert result.launched is not None
    return {(path, n, kind._replace(binary="", tokens=0)) for path, n, kind in result.launched.rows}


def apart(result: Result, rows: int = ROWS) -> Result:
    """Packed rows as rows of the batch."""
    out, lse = (x[0].unflatten(0, (-1, rows)) for x in (result.out, result.lse))
    return Result(out, lse, result.launched)


def assert_same(a: Result, b: Result, what: str) -> None:
    assert same_bits(a.out, b.out) and same_bits(a.lse, b.lse), what


def a_form_changes_no_bit(form: str, path: str, device: torch.device, families: tuple[str, ...]) -> None:
    for family in families:
        call = draw(family, replace(SIZES, path=path), 1, device=device)
        plain = ran(call)
        if path == "prefill" and "listed" in form:
            # Rows that list their keys share no tile, and so have cuts of their own.
            plain = ran(replace(call, path="decode"))
        found = ran(FORMS[form](call))
        assert_same(plain, apart(found) if "packed" in form else found, f"{form}, {path}, {family}")


def a_mask_that_says_causal_is_causal(path: str, device: torch.device) -> None:
    """With one part; a mask of numbers over pages. On a GPU another program is compiled for a mask, which may
    fuse a product and a sum: within budget, then."""
    call = draw("gaussian", replace(SIZES, path=path), 1, device=device)
    other = in_pages(masked(call, numbers=True), 16)
    if device.type == "cuda":
        against_exact(flash(Plan()), other, ran(other, Plan()), lse=True)
        return
    assert_same(ran(call, Plan()), ran(other, Plan()), path)


def any_mask_is_within_the_budget(device: torch.device, paths: tuple[str, ...]) -> None:
    """A mask of each head, or one for all; numbers that are added; a tile that is hidden whole; rows that see
    nothing. What the mask hides from every row is NaN."""
    generator = torch.Generator().manual_seed(0)
    for path in paths:
        call = draw("gaussian", replace(SIZES, path=path), 2, device=device)
        seen = torch.rand((2, 4, ROWS, call.shape.keys), generator=generator) < 0.3
        seen[:, :, :, 64:128] = False
        seen[0, :, 1] = False
        hidden = (~seen).flatten(1, 2).all(1)
        k, v = call.k.clone(), call.v.clone()
        for b in range(2):
            k[b, hidden[b]] = float("nan")
            v[b, hidden[b]] = float("nan")
        numbers = torch.randn(seen.shape, generator=generator).masked_fill(~seen, -torch.inf)
        for mask in (seen, numbers):
            other = replace(call, k=k, v=v, mask=mask.to(device)).checked()
            found = ran(other)
            against_exact(flash(), other, found, lse=True)
            assert bool((found.out[0, 1] == 0).all()) and bool(torch.isneginf(found.lse[0, 1]).all())
    one = replace(call, mask=seen[:1, :1].to(device)).checked()
    against_exact(flash(), one, lse=True)


def any_list_is_within_the_budget(device: torch.device, families: tuple[str, ...]) -> None:
    """In any order, with holes; a window and ALiBi go by the places of keys. What nobody lists is NaN."""
    for family in families:
        call = listed(in_pages(draw(family, SIZES, 3, device=device), 24), order=5, most=90)
        assert call.keys is not None and call.block_table is not None
        named = torch.zeros(call.k.shape[:2], dtype=torch.bool)
        for b in range(2):
            at = call.keys[b][call.keys[b] >= 0].long().cpu()
            named[call.block_table[b].cpu()[at // 24].long(), at % 24] = True
        k, v = (torch.where(named.to(device)[..., None, None], x, float("nan")) for x in (call.k, call.v))
        other = replace(call, k=k, v=v)
        against_exact(flash(), other, ran(other), lse=True)


def rows_are_rows_alone(path: AttentionPath, device: torch.device, families: tuple[str, ...]) -> None:
    """Whatever shares a row's tile: its parts are those of its own keys."""
    heads = Heads.grouped(kv=1, ratio=3, k_size=64, v_size=64)
    # Of `several` one tile of 16 rows: more rows would be a larger one.
    lengths = (63, 65, 200, 0) if path == "several" else (63, 65, 200, 0, 64, 66, 129)
    sizes = InputSizes(n_kv=lengths, heads=heads, path=path)
    for family in families:
        for plan in (TWO_PARTS, Plan(kv=KVCuts("size", 64), heads=(2, 1))):
            call = draw(family, sizes, 4, device=device)
            together = ran(call, plan)
            for t in range(len(sizes.n_kv)):
                row = torch.tensor([t], device=device)
                alone = ran(call.of_rows(row), plan)
                assert same_bits(alone.out[:, 0], together.out[:, t]), (family, plan, t)
                assert same_bits(alone.lse[:, 0], together.lse[:, t]), (family, plan, t)
                assert planned(alone) <= planned(together)
    against_exact(flash(), call, lse=True)


def fused_attention_is_exact(
    device: torch.device, ratio: int, k_size: int, v_size: int, longest: int = 40
) -> None:
    """Of rows of any lengths, none among them, in float16 and float64; a row's bits are its own."""
    heads = Heads.grouped(kv=2, ratio=ratio, k_size=k_size, v_size=v_size)
    sizes = InputSizes(n_kv=(longest, 0, 1, 17, longest - 1, 16), batch=2, fewer=(0, 3), heads=heads)
    # Logits of tens of thousands have fewer digits behind the point.
    for family, off in (("gaussian", 1e-14), ("massive", 1e-10)):
        call = draw(family, sizes, 1, device=device)
        call = replace(call, scale=0.3)
        for x in (call, replace(call, q=call.q.double() / 3, k=call.k.double() / 7, v=call.v.double() / 3)):
            due, found = reference_attention(x), fused_attention(x)
            for mine, its in ((found.out, due.out), (found.lse, due.lse)):
                assert torch.equal(torch.isneginf(mine), torch.isneginf(its)), family
                seen = ~torch.isneginf(its)
                assert bool((mine - its)[seen].norm() <= off * its[seen].norm()), family
        alone = fused_attention(x.of_rows(torch.tensor([4], device=device)))
        assert same_bits(alone.out[:, 0], found.out[:, 4]) and same_bits(alone.lse[:, 0], found.lse[:, 4])


def a_sequence_alone_is_the_sequence_in_its_batch(device: torch.device) -> None:
    sizes = replace(SIZES, batch=3, fewer=(0, 100, 64), path="several")
    call = in_pages(draw("gaussian", sizes, 2, device=device), 16)
    whole = ran(packed(call, [2, 0, 1]))
    for b, rows, count in ((0, slice(0, 2), 2), (2, slice(2, 3), 1)):
        alone = checked_call(
            call.q[b : b + 1, :count], call.k, call.v, kv_len=call.kv_len[b : b + 1, :count],
            block_table=call.block_table[b : b + 1], scale=call.scale, path="several",
        )  # fmt: skip
        found = ran(alone)
        assert same_bits(found.out[0], whole.out[0, rows]) and same_bits(found.lse[0], whole.lse[0, rows])


def chunks_of_packed_rows_change_no_bit(path: str, device: torch.device, monkeypatch: Any) -> None:
    from verify.kernels.flash import launch

    call = packed(in_pages(draw("gaussian", replace(SIZES, path=path), 1, device=device), 16), [2, 1])
    expected = ran(call)
    monkeypatch.setattr(launch, "PARTIALS_AT_ONCE", 2 * 2 * 4 * 16)
    assert_same(expected, ran(call), path)
