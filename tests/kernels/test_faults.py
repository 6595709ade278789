"""The corpus: every known bug is in it, and clean variants are what they claim to be."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from support.other_device import other_device
from verify.kernels.budget.bound import error_budget
from verify.kernels.faults import FAULTS, VARIANTS, Fault, Variant
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.judging.families import ALL_FAMILIES, FAMILIES, draw
from verify.kernels.judging.figures import budget_ratio
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel
from verify.kernels.trace import LaunchTrace

SIZES = InputSizes(n_kv=(161, 97, 0), batch=2)
# One reference of every line of the list of real bugs that the corpus grew from.
KNOWN = [
    "SGLang #40903", "llama.cpp #19092", "llama.cpp #18487", "PyTorch #191937", "FlashInfer #4051",
    "llama.cpp #17746", "ik #2144", "llama.cpp #14840", "llama.cpp #17089", "FlagGems #5235", "ik #1183",
    "ik #2087", "ik #1452", "ik #1206", "ik #1104", "ik #1973",
]  # fmt: skip


def test_every_known_bug_has_its_fault() -> None:
    referenced = {reference for fault in FAULTS for reference in fault.references}
    assert set(KNOWN) <= referenced
    names = {fault.name for fault in FAULTS}
    # Two lines of the list have no issue of their own.
    assert {"accumulator not rescaled", "wrong by 2 %"} <= names
    assert len(names) == len(FAULTS) >= 24
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS) >= 12


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_faults_say_where_they_were_seen(fault: Fault) -> None:
    for reference in fault.references:
        assert reference == "emulated" or re.fullmatch(r"[\w. -]+ #\d+", reference)
    assert fault.what and fault.plan


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_variants_stay_within_their_own_budget(variant: Variant) -> None:
    for family in FAMILIES:
        if family in variant.without:
            continue
        call = draw(family, SIZES, seed=5)
        kernel = variant.build()
        result = kernel.run(call)
        budget = error_budget(call, kernel.arithmetic(call.shape, call.path))
        assert float(budget_ratio(result.out - budget.out, budget.bound).max()) <= 1, family
        empty = call.kv_len == 0
        assert bool((result.out[empty] == 0).all())


def test_they_run_where_the_call_lies() -> None:
    """On a device that is not there: what a kernel creates on the host, or leaves there, is refused."""
    with other_device() as device:
        call = draw("sinks", InputSizes(n_kv=(161, 0)), seed=0, device=device)
        slopes = torch.linspace(0.5, 0.1, call.shape.q_heads, device=device)
        call = replace(call, sliding_window=100, softcap=5.0, alibi_slopes=slopes)
        for subject in (*FAULTS, *VARIANTS):
            result = subject.build().run(call)
            assert result.out.device == result.lse.device == device, subject.name


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_inputs_are_drawn_where_they_are_asked_for(family: str) -> None:
    with other_device() as device:
        call = draw(family, InputSizes(n_kv=(65, 0, 33)), seed=0, device=device)
        assert {x.device for x in (call.q, call.k, call.v, call.kv_len)} == {device}


def test_a_tensor_on_another_device_is_refused() -> None:
    with other_device() as device:
        call, host = draw("gaussian", SIZES, seed=0, device=device), torch.ones(2, 1, 1, 1)
        assert (call.q * host.to(device)).device == torch.ones(2, device=device).device == device
        assert call.q.cpu().device == torch.device("cpu")
        with pytest.raises(RuntimeError, match="lies on the cpu"):
            call.q * host


def test_variants_do_round_differently() -> None:
    """Were two the same kernel, one of them would prove nothing."""
    call = draw("gaussian", SIZES, seed=1)
    plain = VARIANTS[0].build().run(call)
    same = []
    for variant in VARIANTS[1:]:
        result = variant.build().run(call)
        if torch.equal(result.out, plain.out) and torch.equal(result.lse, plain.lse):
            same.append(variant.name)
    assert same == []


def test_the_tile_kernel_is_eager_in_other_words() -> None:
    call = draw("gaussian", InputSizes(n_kv=(200, 64)), seed=2)
    tile, eager = TileKernel("tile", kv=2).run(call), build_kernel("eager:kv=2").run(call)
    assert float((tile.out - eager.out).abs().max()) < 1e-4
    assert float((tile.lse - eager.lse).abs().max()) < 1e-5


def test_what_ran_is_in_the_trace() -> None:
    call = draw("gaussian", SIZES, seed=0)
    kernel = TileKernel("tile", kv=3, heads=(4, 2))
    trace = LaunchTrace([kernel.run(call).launched])
    ((_, signature),) = trace.at(161)
    assert signature.head_groups == (4, 2)
    assert signature.cuts == (0, 64, 128, 161)
    assert trace.total_rows == 6


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("last key dropped", (0, 160)),
        ("cut key twice", (0, -1, -1, 161)),
        ("cut key lost", (0, -1, -1, 161)),
        ("never ran", (0, 161)),
    ],
)
def test_parts_are_counted_where_they_are_closed(name: str, cuts: tuple[int, ...]) -> None:
    """A bound at which one part ends and another does not begin is not known."""
    kernel = next(fault for fault in FAULTS if fault.name == name).build()
    ran = kernel.run(draw("gaussian", SIZES, seed=0)).launched.rows
    assert {s.cuts for _, n_kv, s in ran if n_kv == 161} == {cuts}
