"""Float16 sums that stagnate and overflow, an lse that counts ALiBi from another key, V that lies in K."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from verify.kernels.budget.arithmetic import Arithmetic, loosest
from verify.kernels.budget.bound import error_budget
from verify.kernels.call import AttentionOutput, Call, checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.faults import FAULTS
from verify.kernels.faults.clean import ReversedTiles
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.heads import Heads
from verify.kernels.judging.detectors import findings, measure
from verify.kernels.judging.emulation import EmulatedSums, limit_of_float16_sums
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.figures import another_origin
from verify.kernels.judging.headroom import F16_LARGEST, row_headroom
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.probes import check, judge, last_key_edge, one_hot, standard_probes
from verify.kernels.registry import build_kernel

ONE = InputSizes(n_kv=(8192,), heads=Heads.grouped(kv=1, ratio=2, k_size=32, v_size=32))
LATENT = InputSizes(
    n_kv=(150, 65), heads=Heads.grouped(kv=1, ratio=3, k_size=96, v_size=64), edges=(64, 128), v_in_k=True
)


def stagnating(keys: int) -> Call:
    return draw("one-sign", replace(ONE, n_kv=(keys,)), 0)


def test_the_expected_size_of_float16_sums_knows_that_steps_are_rounded_alike() -> None:
    """One part of 8,192 keys of one sign: 2.3 times what independent roundings would come to."""
    call = stagnating(8192)
    kernel = build_kernel("eager:acc=f16")
    found = measure(call, kernel.run(call), kernel.arithmetic_of(call), distinct=True)
    assert found.rms < 1
    # Where values have no sign in common nothing adds up, and nothing is allowed for.
    call = draw("gaussian", replace(ONE, n_kv=(2048,)), 0)
    result = kernel.run(call)
    found = measure(call, result, kernel.arithmetic_of(call), distinct=True)
    assert findings(found) == [] and found.rms > 0.5
    undeclared = measure(call, result, build_kernel("eager").arithmetic_of(call), distinct=True)
    assert undeclared.rms > 3 * undeclared.rms_limit


@pytest.mark.slow
def test_a_sum_that_stagnates_is_a_limit_where_it_is_stated() -> None:
    """65,536 keys: more than an eighth is lost, by this kernel and by anything else that sums so."""
    call = stagnating(65_536)
    kernel = build_kernel("eager:acc=f16")
    result, arithmetic = kernel.run(call), kernel.arithmetic_of(call)
    budget = error_budget(call, arithmetic)
    # The expected size of stated float16 sums knows of it, but so far off nobody is without a word.
    found = findings(measure(call, result, arithmetic, distinct=True))
    assert [f.detector for f in found] == ["budget"] and "no correct kernel exceeds 1/8" in found[0].said
    assert float((result.out.double() - budget.out).norm() / budget.size.norm()) > 1 / 8
    said = limit_of_float16_sums(call, result.out, budget.out, arithmetic)
    assert said is not None and "they stagnate" in said
    # What is lost twice over is no limit of the sums.
    worse = 3 * result.out - 2 * budget.out.float()
    assert limit_of_float16_sums(call, worse, budget.out, arithmetic) is None


def added_one_by_one(keys: int) -> tuple[Call, AttentionOutput, Arithmetic]:
    """Float16 sums that take a key at a time: beside 2,048 times its size a key is lost."""
    call = stagnating(keys)
    stated = Arithmetic(acc="f16", block=64, cuts_at=lambda n: (0, n), sum_step=1)
    return call, EmulatedSums(stated, 1).run(call), stated


def test_sums_that_are_only_assumed_excuse_an_eighth_and_no_more() -> None:
    call, result, stated = added_one_by_one(4096)
    assumed, budget = loosest("f16"), error_budget(call, stated)
    found = measure(call, result, assumed, distinct=True)
    assert found.gain < -1 / 8 and found.rms < 1, "what is assumed expects it"
    assert "no correct kernel exceeds 1/8" in findings(found)[0].said
    assert limit_of_float16_sums(call, result.out, budget.out, assumed) is None
    # Who says that sums are such, or of whom it was read, has a limit, and it has a name.
    two = replace(stated, cuts_at=lambda n: (0, n // 8, n), identified=True)
    for known in (stated, replace(stated, identified=True), replace(stated, identified=True, sum_share=0.9)):
        said = limit_of_float16_sums(call, result.out, budget.out, known)
        assert said is not None and "they stagnate" in said
    # Two sums of which only the number is known: each takes half of the keys, and loses hardly anything.
    assert limit_of_float16_sums(call, result.out, budget.out, two) is None
    # A gain of less, which they may have, is no fault.
    call, result, _ = added_one_by_one(2300)
    found = measure(call, result, assumed, distinct=True)
    assert findings(found) == [] and 0.05 < found.gain < 1 / 8


def test_an_overflow_is_a_limit_in_the_same_elements_alone() -> None:
    call = draw(
        "near-overflow", InputSizes(n_kv=(257,), heads=Heads.grouped(kv=1, ratio=2, k_size=64, v_size=64)), 0
    )
    kernel = build_kernel("eager:acc=f16")
    result, arithmetic = kernel.run(call), kernel.arithmetic_of(call)
    budget = error_budget(call, arithmetic)
    said = limit_of_float16_sums(call, result.out, budget.out, arithmetic)
    assert said is not None and "overflow, as they do when emulated" in said
    # Nor where one more is not finite, nor of an arithmetic that is assumed, nor of float32 sums.
    finite = torch.isfinite(result.out).nonzero()[0].tolist()
    more = result.out.clone()
    more[tuple(finite)] = torch.inf
    assert limit_of_float16_sums(call, more, budget.out, arithmetic) is None
    assert limit_of_float16_sums(call, result.out, budget.out, loosest("f16")) is None
    assert limit_of_float16_sums(call, result.out, budget.out, replace(arithmetic, acc="f32")) is None


def test_the_order_of_a_walk_decides_what_overflows_and_what_explains_it() -> None:
    """Three tiles of a sum that overflows, unless a larger logit of the last one was seen before."""
    logits, values = (torch.zeros(1, 256, 1, 64) for _ in range(2))
    logits[:, 192:, :, 0], values[:, :192] = 6.0, torch.linspace(300.0, 420.0, 64)
    q = torch.zeros(1, 1, 2, 64)
    q[..., 0] = 8.0
    kv_len = torch.tensor([[256]], dtype=torch.int32)
    call = checked_call(q.half(), logits.half(), values.half(), kv_len=kv_len, scale=0.125)
    kernel = ReversedTiles("backward", acc="f16", block=64)
    arithmetic = kernel.arithmetic_of(call)
    forward = replace(arithmetic, tile_order="forward")
    rooms = [float(row_headroom(call, each).partial.max()) for each in (arithmetic, forward)]
    unknown = replace(arithmetic, tile_order=None)
    assert float(row_headroom(call, unknown).partial.max()) == max(rooms) > F16_LARGEST > min(rooms)
    by_order = {"backward": kernel, "forward": TileKernel("forward", acc="f16", block=64)}
    exact = exact_attention(call).out.double()
    for order, each in by_order.items():
        out = each.run(call).out
        assert bool(torch.isfinite(out).all()) == (order == "backward")
        told = {name: limit_of_float16_sums(call, out, exact, replace(arithmetic, tile_order=name))
                for name in ("forward", "backward", None)}  # fmt: skip
        other = "forward" if order == "backward" else "backward"
        assert told[order] is not None and told[None] is not None and told[other] is None


class LastTileFirst(TileKernel):
    """The tile that needs a mask first, then the others forward."""

    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        tiles = super().tiles(start, stop)
        return tiles[-1:] + tiles[:-1]


def test_an_order_that_is_no_walk_may_overflow_where_some_order_does() -> None:
    """A sum that is full after its last tile, which the next one empties: it overflows in neither walk."""
    values = torch.zeros(1, 192, 1, 64)
    values[:, 128:], values[:, :64], values[:, 64:128] = 800.0, 400.0, -700.0
    flat = torch.zeros(1, 192, 1, 64).half()
    q = torch.zeros(1, 1, 2, 64).half()
    kv_len = torch.tensor([[192]], dtype=torch.int32)
    call = checked_call(q, flat, values.half(), kv_len=kv_len, scale=0.125)
    kernel = LastTileFirst("last first", acc="f16", block=64)
    out, exact = kernel.run(call).out, exact_attention(call).out
    assert bool(torch.isinf(out).all())
    for walk in (TileKernel("forward", acc="f16", block=64), ReversedTiles("back", acc="f16", block=64)):
        assert bool(torch.isfinite(walk.run(call).out).all())
    read = replace(kernel.arithmetic_of(call), identified=True, tile_order=None)
    assert "as sums of such values may" in (limit_of_float16_sums(call, out, exact, read) or "")
    # Not where a walk was seen, nor where it was stated, nor where no order comes so far.
    assert limit_of_float16_sums(call, out, exact, replace(read, tile_order="forward")) is None
    assert limit_of_float16_sums(call, out, exact, replace(read, identified=False)) is None
    small = replace(call, v=call.v * 2.0**-6)
    assert limit_of_float16_sums(small, out, exact_attention(small).out, read) is None


@pytest.mark.parametrize("step", [16, 64])
def test_sums_that_were_read_off_are_emulated_as_they_are(step: int) -> None:
    """An offset and a rounding a tile move the overflow: what is read as a key at a time may be either."""
    heads = Heads.grouped(kv=1, ratio=4, k_size=64, v_size=64)
    call = draw("near-overflow", InputSizes(n_kv=(300,) * 32, heads=heads), 1)
    kernel = EmulatedSums(
        Arithmetic(acc="f16", block=64, cuts_at=lambda n: (0, n), p_shift=2.0793, sum_step=step), step
    )
    out, exact = kernel.run(call).out, exact_attention(call).out
    read = replace(kernel.of, sum_step=1, identified=True)
    bad = ~torch.isfinite(out)
    assert bad.any() and not bad.all()
    said = limit_of_float16_sums(call, out, exact, read)
    assert said is not None and "overflow, as they do when emulated" in said
    # Stated, it is what it says; without the offset, or where far more overflows, it is another's.
    assert limit_of_float16_sums(call, out, exact, replace(read, identified=False)) is None
    assert limit_of_float16_sums(call, out, exact, replace(read, p_shift=0.0)) is None
    more = torch.where(exact.abs() < 1e4, torch.inf, out)
    assert (torch.isinf(more) & ~bad).any()
    assert limit_of_float16_sums(call, more, exact, read) is None


def test_sums_of_which_only_the_number_is_known_may_overflow_where_some_order_does() -> None:
    heads = Heads.grouped(kv=1, ratio=4, k_size=64, v_size=64)
    call = draw("near-overflow", InputSizes(n_kv=(300, 263), heads=heads), 0)
    arithmetic = Arithmetic(acc="f16", block=64, cuts_at=lambda n: (0, n // 3, n), identified=True)
    kernel = EmulatedSums(replace(arithmetic, cuts_at=lambda n: (0, n // 2, n)), 16)
    out, exact = kernel.run(call).out, exact_attention(call).out
    assert (~torch.isfinite(out)).any()
    assert "as sums of such values may" in (limit_of_float16_sums(call, out, exact, arithmetic) or "")
    # Not where no sum comes so far, nor where the rest is wrong.
    small = replace(call, v=call.v * 2.0**-12)
    assert limit_of_float16_sums(small, out, exact_attention(small).out, arithmetic) is None
    off = torch.where(torch.isfinite(out), out * 1.5, out)
    assert limit_of_float16_sums(call, off, exact, arithmetic) is None


def test_an_lse_that_counts_alibi_from_another_key_is_said_and_no_fault() -> None:
    call = draw("alibi", InputSizes(n_kv=(130, 93)), 0)
    kernel = build_kernel("eager")
    result, arithmetic = kernel.run(call), kernel.arithmetic_of(call)
    budget = error_budget(call, arithmetic)
    assert call.alibi_slopes is not None
    first = result.lse + call.alibi_slopes * (call.kv_len[..., None] - 1)
    assert another_origin(call, first, budget)
    found = findings(measure(call, AttentionOutput(result.out, first), arithmetic, distinct=True))
    assert [f.detector for f in found] == ["contract"]
    # Right as it stands, off by a constant, or by another slope: none of these is an origin.
    for lse in (result.lse, result.lse + 1, result.lse / 0.693, first + 0.01 * torch.rand(first.shape)):
        assert not another_origin(call, lse, budget)
    off = findings(measure(call, AttentionOutput(result.out, result.lse + 1), arithmetic, distinct=True))
    assert [f.detector for f in off] == ["lse"]
    dropped = next(f for f in FAULTS if f.name == "ALiBi dropped").build().run(call)
    assert not another_origin(call, dropped.lse, budget)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_values_that_lie_in_keys_are_their_first_columns(family: str) -> None:
    call = draw(family, LATENT, 0)
    assert call.v.data_ptr() == call.k.data_ptr()
    assert torch.equal(call.v, call.k[..., :64])
    kernel = build_kernel("eager:kv=2")
    result = kernel.run(call)
    m = measure(call, result, kernel.arithmetic_of(call), distinct=FAMILIES[family].distinct)
    assert findings(m) == []


def test_probes_of_values_in_keys_are_right_and_see_what_they_must() -> None:
    kernel = build_kernel("eager:kv=3")
    for probe in standard_probes(LATENT):
        assert probe.call.v.data_ptr() == probe.call.k.data_ptr(), probe.name
        assert [str(failure) for failure in check(probe, kernel)] == []
    # Another key's value, and the values of the columns that ask.
    probe = one_hot(LATENT)
    swapped = probe.call.v.roll(1, 1)
    assert judge(probe, kernel.run(replace(probe.call, v=swapped)), kernel.arithmetic_of(probe.call))
    probe = last_key_edge(LATENT)
    shifted = probe.call.k[..., 32:96]
    assert judge(probe, kernel.run(replace(probe.call, v=shifted)), kernel.arithmetic_of(probe.call))
