"""Kernels that sum in float16 overflow where their headroom says so, and not before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from verify.kernels.call import Call
from verify.kernels.faults.clean import MaximumOffset, ReversedTiles
from verify.kernels.heads import Heads
from verify.kernels.judging.families import draw
from verify.kernels.judging.headroom import (
    ENOUGH,
    OFFSETS,
    HeadroomPlace,
    grown_to,
    headroom,
    headroom_sentences,
    row_headroom,
    safe_offset,
)
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel

HEADS = Heads(4, 2, 64, 64)
# Values and sums of float16 are rounded: where it overflows is known to a few of its steps.
NEARLY = 1.02


def scaled(call: Call, times: float) -> Call:
    """Float32 values stand for any size; kernels read them as they are."""
    return replace(call, v=call.v.float() * times)


@pytest.mark.parametrize("family", ["gaussian", "one-sign", "flat", "needles", "rising", "softcap", "window"])
@pytest.mark.parametrize(
    ("build", "offset"),
    [
        (lambda: build_kernel("eager:acc=f16,block=32,kv=2"), 0.0),
        (lambda: build_kernel("eager:acc=f16,block=64"), 0.0),
        (lambda: MaximumOffset("offset", acc="f16", block=32), MaximumOffset.offset),
        (lambda: ReversedTiles("backward", acc="f16", block=64), 0.0),
    ],
)
def test_a_kernel_overflows_where_its_headroom_says(
    family: str, build: Callable[[], Kernel], offset: float
) -> None:
    kernel = build()
    call = draw(family, InputSizes(n_kv=(190, 64), heads=HEADS, edges=(32,)), 0)
    partial = float(row_headroom(call, kernel.arithmetic_of(call)).partial.max())
    times = headroom(partial, offset)
    assert torch.isfinite(kernel.run(scaled(call, times / NEARLY)).out).all()
    assert not torch.isfinite(kernel.run(scaled(call, times * NEARLY)).out).all()


def test_the_smallest_safe_offset_leaves_the_room_that_it_says() -> None:
    call = scaled(draw("one-sign", InputSizes(n_kv=(190,), heads=HEADS, edges=()), 0), 400.0)
    found = row_headroom(call, build_kernel("eager:acc=f16,block=32").arithmetic_of(call))
    partial = float(found.partial.max())
    c = safe_offset(partial)
    assert c > 0 and headroom(partial, c) == pytest.approx(ENOUGH)

    class Offset(MaximumOffset):
        offset = c

    kernel = Offset("safe", acc="f16", block=32)
    assert torch.isfinite(kernel.run(scaled(call, ENOUGH / NEARLY)).out).all()
    assert not torch.isfinite(kernel.run(scaled(call, ENOUGH * NEARLY)).out).all()
    assert safe_offset(1.0) == 0.0 and headroom(0.0, 0.0) == math.inf


def test_figures_of_a_row_are_those_of_its_keys() -> None:
    call = draw("gaussian", InputSizes(n_kv=(5, 3, 0), heads=HEADS, edges=()), 1)
    found = row_headroom(call)
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    assert float(found.partial[0, 2].max()) == 0.0
    for row, n in ((0, 5), (1, 3)):
        for head in range(4):
            s = call.scale * k[0, :n, head // 2] @ q[0, row, head]
            its = v[0, :n, head // 2]
            # All keys are one step.
            due = (torch.exp(s - s.max())[:, None] * its).sum(0).abs().max()
            seen = [float(x[0, row, head]) for x in found]
            assert seen == pytest.approx(
                [float(due), float(s.abs().max()), float(s.abs().max() / call.scale),
                 float(its.abs().max()), float(k[0, :n, head // 2].abs().max())]
            )  # fmt: skip


def test_longer_rows_are_foretold_with_an_interval() -> None:
    """Values of one sign under equal logits: sums grow as their keys do."""
    seen = []
    for n in (64, 128, 256, 512, 2048):
        call = draw("one-sign", InputSizes(n_kv=(n,), heads=HEADS, edges=()), n)
        found = row_headroom(call, build_kernel("eager").arithmetic_of(call))
        seen.append((n, float(found.partial.max())))
    told = grown_to(seen[:-1], 2048)
    assert told is not None and told.low < seen[-1][1] < told.high and told.high < 6 * told.low
    assert grown_to(seen[:2], 2048) is None


def test_what_is_said() -> None:
    place = HeadroomPlace(1000.0, "layer 3, head 5")
    said = headroom_sentences("eager", place, place, place, None, fp8=True)
    assert "65.5 times below 65,504; 131 times with an offset of ln 2" in said[0] and len(said) == 3
    assert "0.448 times below e4m3's 448" in said[2]
    said = headroom_sentences("eager", place._replace(value=32752.0), place, place, None, fp8=False)
    assert "an offset of 0.693 leaves 4 times, and costs 1 bits" in said[-1]
    assert OFFSETS[2] == 3 * 0.6931
