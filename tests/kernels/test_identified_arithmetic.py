"""What a budget is given of a kernel that was read: the loosest of what was seen, and nothing beyond it."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from support import ggml_mma
from verify.kernels.budget.arithmetic import loosest
from verify.kernels.budget.bound import error_budget
from verify.kernels.call import Result
from verify.kernels.faults.clean import ReversedTiles
from verify.kernels.heads import Heads
from verify.kernels.identify.arithmetics import KnownReadings, arithmetic_of, coarser
from verify.kernels.identify.asking import Regime, bare
from verify.kernels.identify.reading import Reading, read
from verify.kernels.judging.detectors import findings, measure
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel
from verify.kernels.trace import Launched

HEADS = Heads(4, 1, 64, 64)


def readings(spec: str, *lengths: int) -> tuple[Reading, ...]:
    kernel = build_kernel(spec)
    return tuple(read(bare(kernel, "decode"), Regime(n, ratio=4, kv_heads=1)) for n in lengths)


@pytest.fixture(scope="module")
def plain() -> tuple[Reading, ...]:
    return readings("eager:kv=2,block=32", 64, 256)


def sizes(*n_kv: int) -> InputSizes:
    return InputSizes(n_kv=n_kv, heads=HEADS, edges=())


def test_an_arithmetic_is_as_it_was_stated(plain: tuple[Reading, ...]) -> None:
    found, stated = arithmetic_of(plain[1:], "f16"), build_kernel("eager:kv=2,block=32")
    own = stated.arithmetic_of(draw("gaussian", sizes(256), 0))
    assert found is not None and found.stated and not found.promises_bits
    for name in ("p", "acc", "out", "block", "u", "u_q", "p_shift", "l_from_rounded_p", "stale_maximum"):
        assert getattr(found, name) == getattr(own, name), name
    assert found.depths(256).parts == own.depths(256).parts == 2
    assert found.depths(256).longest >= own.depths(256).longest


def test_a_part_that_ends_a_key_behind_a_tile_is_of_the_tiles_of_longer_ones() -> None:
    """Float16 sums walked backward were emulated in tiles of 65 keys, and a right kernel was broken."""
    attend = bare(ReversedTiles("kernel", acc="f16"), "decode")
    short, long = (read(attend, Regime(n, ratio=4, kv_heads=1)) for n in (65, 300))
    assert (short.tile, long.tile, long.tile_order) == (None, 64, "backward")
    found = arithmetic_of((short, long), "f16")
    assert found is not None and found.block == 64
    other = arithmetic_of((replace(short, n_kv=80, cuts=(0, 80)), long), "f16")
    assert other is not None and other.block == 80


def test_budgets_of_a_kernel_that_was_read_hold_it_and_see_a_small_factor(plain: tuple[Reading, ...]) -> None:
    known, kernel = KnownReadings(plain), build_kernel("eager:kv=2,block=32")
    call = draw("gaussian", sizes(256, 219), 1)
    arithmetic = known.at(call)
    assert arithmetic is not None
    result = kernel.run(call)
    right = measure(call, result, arithmetic, distinct=True)
    assert right.budget <= 1 and findings(right) == []
    wrong = replace(result, out=result.out * (1 + 2e-4))
    assert "gain" in {each.detector for each in findings(measure(call, wrong, arithmetic, distinct=True))}
    # Of a kernel that nothing is known of it may be rounding.
    loose = measure(call, wrong, loosest("f16"), distinct=True)
    assert not {"gain", "rms", "budget"} & {each.detector for each in findings(loose)}
    assert not error_budget(call, arithmetic).vacuous.any()


def test_nothing_is_said_of_calls_that_nothing_was_read_of(plain: tuple[Reading, ...]) -> None:
    known = KnownReadings(plain)
    assert known.at(draw("gaussian", sizes(100), 0)) is not None
    assert known.at(draw("gaussian", sizes(200, 1), 0)) is not None
    assert known.at(draw("gaussian", sizes(300), 0)) is None
    assert known.at(draw("sinks", sizes(100), 0)) is None
    assert KnownReadings(()).at(draw("gaussian", sizes(100), 0)) is None
    assert (
        KnownReadings(plain[1:]).at(draw("gaussian", sizes(100), 0)) is None
    )  # half as long as anything read


def test_lengths_that_differ_are_given_the_looser_or_nothing(plain: tuple[Reading, ...]) -> None:
    short, long = plain
    narrow = replace(long, accumulator="f16", accumulator_bits=11)
    looser = arithmetic_of((short, narrow), "f16")
    assert looser is not None and looser.acc == "f16"
    assert arithmetic_of((short, replace(long, p="bf16")), "f16") is None
    assert arithmetic_of((replace(long, p="e4m3"),), "f16") is None
    assert arithmetic_of((replace(long, offset=None),), "f16") is None
    unseen = arithmetic_of((replace(long, tile=None, how={}),), "f16")
    assert unseen is not None and unseen.block is None and unseen.depths(256).d_n == 512
    assert (looser.tile_order, looser.l_in_tiles) == (None, True), "a row of one tile shows no order"
    (backward,) = (arithmetic_of((replace(long, tile_order="backward"),), "f16"),)
    assert backward is not None and backward.tile_order == "backward"
    # Products of 16 keys say how they are added up, and nothing of what l sums first.
    products = arithmetic_of((replace(long, tile=None, mma_block=16, how={}),), "f16")
    assert products is not None and (products.block, products.l_in_tiles) == (16, False)
    late = arithmetic_of((replace(long, rescale=5.0, q_scaled_in=None, exponential=1e-4),), "f16")
    assert late is not None and late.stale_maximum and late.u_q == 2.0**-11 and not late.stated


def test_logits_of_16_bits_are_said_and_not_allowed_for(plain: tuple[Reading, ...]) -> None:
    (said,) = coarser([replace(each, logits="f16") for each in plain])
    assert "float16" in said and "64 keys" in said and coarser(plain) == []


def test_options_of_a_kernel_in_place_do_not_change_what_is_read() -> None:
    torch.manual_seed(5)
    once, again = readings("eager:acc=f16", 100), readings("eager:acc=f16", 100)
    assert once == again


def test_an_exponential_that_is_off_is_given_room(plain: tuple[Reading, ...]) -> None:
    """FlashAttention 4 computes some by a cubic: 9e-5 off, and right."""
    exact, off = (
        arithmetic_of([replace(each, exponential=e) for each in plain], "f16") for e in (1e-7, 9e-5)
    )
    assert exact is not None and off is not None
    assert (exact.u_exp, exact.stated) == (0.0, True)
    assert (off.u_exp, off.stated) == (2 * 9e-5, False)


def faults_at(n_kv: int, parts: int) -> dict[str, set[str]]:
    """What is found of llama.cpp's arithmetic on CUDA by what is read off it, right and with two faults."""
    heads = Heads(12, 1, 64, 64)
    names = (ggml_mma.mma, ggml_mma.drops_a_key, ggml_mma.one_head_off)
    right, dropping, off = (functools.partial(f, parts=parts) for f in names)
    regime = Regime(n_kv, n_q=2, ratio=heads.ratio, kv_heads=heads.kv)
    arithmetic = arithmetic_of([read(right, regime)], "f16")
    assert arithmetic is not None and arithmetic.acc == "f16"
    found: dict[str, set[str]] = {"right": set(), "dropping": set(), "off": set()}
    for family in ("gaussian", "flat", "needles"):
        rows = InputSizes(n_kv=tuple(range(n_kv - 3, n_kv + 1)), heads=heads, edges=())
        call = draw(family, rows, 0)
        budget = error_budget(call, arithmetic)
        assert not budget.vacuous.any()
        for name, kernel in (("right", right), ("dropping", dropping), ("off", off)):
            out = kernel(call.q, call.k, call.v, kv_len=call.kv_len, scale=call.scale)
            result = Result(out, budget.lse.float(), Launched(Counter()))
            figures = measure(
                call, result, arithmetic, distinct=family != "flat", budget=budget, heads_alike=True
            )
            found[name] |= {each.detector for each in findings(figures)}
            # By itself, whatever the limits that its roundings leave; a few Gaussian rows are too noisy.
            apart = figures.apart > figures.apart_limit
            assert apart == (name == "off") or (family != "needles" and not apart), (family, name)
    return found


def test_faults_in_llama_cpps_arithmetic_on_cuda_are_found_by_what_is_read_off_it() -> None:
    """One key left out, and one of twelve heads 0.1 % too large: float16 sums leave room for neither."""
    found = faults_at(2048, parts=3)
    assert found["right"] == set()
    assert "rms" in found["dropping"] and "gain" in found["off"]


@pytest.mark.slow
def test_the_same_faults_at_the_length_where_its_arithmetic_begins() -> None:
    found = faults_at(ggml_mma.SWITCH, ggml_mma.PARTS)
    assert found["right"] == set()
    assert "rms" in found["dropping"] and "gain" in found["off"]
