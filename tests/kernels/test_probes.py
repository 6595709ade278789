"""Probes: the code's distance, what a correct kernel answers, and what each fault is told."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from verify.kernels.budget.arithmetic import Arithmetic, loosest
from verify.kernels.eager import EagerKernel
from verify.kernels.faults import FAULTS, VARIANTS
from verify.kernels.judging.hidden_keys import POISON
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.probes import (
    Probe,
    alibi_edge,
    check,
    code_words,
    constant_v,
    counted,
    empty_rows,
    judge,
    last_key_edge,
    one_hot,
    one_hot_edges,
    sink_weights,
    softcap_edge,
    standard_probes,
    strided_one_hot,
    tags,
    window_edge,
)
from verify.kernels.judging.probes.level_probes import constant_bound
from verify.kernels.judging.probes.one_hot_probes import GAP
from verify.kernels.registry import build_kernel

SIZES = InputSizes(n_kv=(150, 65, 1), edges=(64, 128))
SPECS = [
    "eager", "eager:kv=3,block=16", "eager:acc=f16,kv=2", "eager:p=bf16", "eager:out=f16",
    "eager:heads=4+2,kv=size:64,out=bf16",
]  # fmt: skip


@pytest.mark.parametrize(("size", "distance"), [(16, 4), (32, 8), (64, 16), (80, 16), (128, 32)])
def test_words_are_a_quarter_of_their_length_apart(size: int, distance: int) -> None:
    words = code_words(400, size)
    products = words @ words.T
    used = 1 << (size.bit_length() - 1)
    apart = (used - products) / 2
    apart.fill_diagonal_(used)
    assert float(apart.min()) >= distance
    # The gap of the logits, with q = 64 * word and scale D^-1/2.
    assert 64 * 2 * distance * size**-0.5 >= GAP


def test_words_far_in_the_code_are_distinct_too() -> None:
    words = torch.cat((code_words(50, 64), code_words(50, 64, first=131_000)))
    assert float((words @ words.T - 64 * torch.eye(100)).max()) <= 32


def test_a_code_says_when_it_ends() -> None:
    with pytest.raises(ValueError, match="head size 16: 2048 code words, expected 2049"):
        code_words(2049, 16)


def test_tags_differ_by_key_and_head_in_every_type() -> None:
    values = tags(300, 3, 16).flatten(0, 1)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(values.to(dtype).float(), values)
    assert len(values.unique(dim=0)) == 900


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_correct_kernel_passes_every_probe(spec: str, dtype: torch.dtype) -> None:
    kernel = build_kernel(spec)
    for probe in standard_probes(InputSizes(n_kv=SIZES.n_kv, edges=SIZES.edges, dtype=dtype, batch=2)):
        assert [str(failure) for failure in check(probe, kernel)] == []


def test_prefill_passes_too() -> None:
    kernel = build_kernel("eager:kv=2")
    for probe in standard_probes(InputSizes(n_kv=(150,), edges=(64,), path="prefill")):
        assert check(probe, kernel) == []


def test_one_hot_asks_for_every_key_of_every_kv_head() -> None:
    probe = one_hot(SIZES)
    assert probe.keys is not None
    for head in range(SIZES.heads.kv):
        of_head = probe.keys[..., head * SIZES.heads.ratio : (head + 1) * SIZES.heads.ratio]
        assert set(of_head.flatten().tolist()) == set(range(150))
    assert bool((probe.call.v[:, 150:] == POISON).all())


def test_one_hot_asks_for_every_key_once_in_one_of_two_layouts() -> None:
    r, asked = SIZES.heads.ratio, []
    for layout in (False, True):
        probe = one_hot(SIZES, once=True, strided=layout)
        assert probe.keys is not None and check(probe, build_kernel("eager:kv=3")) == []
        by_head = probe.keys[0].unflatten(1, (SIZES.heads.kv, r))
        asked += by_head.flatten().tolist()
        # Neighbours, of all of which each KV head has some.
        assert bool(((by_head[..., 1:] - by_head[..., :-1]) % 150 == 1).all())
        assert all(len(set((by_head[:, h, 0] // r).tolist())) > 3 for h in range(SIZES.heads.kv))
    assert set(asked) == set(range(150))
    # Twice is what fills up the last row.
    assert len(asked) - 150 < 2 * SIZES.heads.q


@pytest.mark.parametrize("key", [0, 63, 64, 127, 149])
def test_a_key_that_is_not_read_is_named(key: int) -> None:
    """V of one key is swapped for another's: the failure says which key, head and part, and both values."""
    probe = one_hot(SIZES)
    kernel = build_kernel("eager:kv=3")
    probe.call.v[:, key, 1] = probe.call.v[:, (key + 1) % 150, 1]
    failures = check(probe, kernel, most=1000)
    assert {failure.key for failure in failures} == {key}
    assert {failure.head // SIZES.heads.ratio for failure in failures} == {1}
    assert {failure.part for failure in failures} == {0 if key < 64 else 1 if key < 128 else 2}
    assert all(failure.expected != failure.got for failure in failures)
    assert f"key {key}, part" in str(failures[0]) and "expected" in str(failures[0])


@pytest.mark.parametrize(
    ("fault", "probe"),
    [
        ("last key dropped", last_key_edge(SIZES)),
        ("key beyond", last_key_edge(SIZES)),
        ("padding seen", counted(SIZES, 64, 1, 3)),
        ("base-2 merge", counted(SIZES, 64, 1, 3)),
        ("cut key twice", counted(SIZES, 64, 1, 3)),
        ("mean of parts", counted(SIZES, 64, 3, 1)),
        ("cut key lost", one_hot_edges(SIZES, (64, 128))),
        ("heads interleaved", one_hot(SIZES)),
        ("group does not divide", one_hot(SIZES)),
        ("strides ignored", strided_one_hot(SIZES)),
        ("window dropped", window_edge(SIZES, 20)),
        ("window off by one", window_edge(SIZES, 20)),
        ("empty part NaN", window_edge(SIZES, 20)),
        ("empty part finite", window_edge(SIZES, 20)),
        ("empty row NaN", empty_rows(SIZES)),
        ("empty row +inf", empty_rows(SIZES)),
        ("first row's length", empty_rows(SIZES)),
        ("sinks dropped", sink_weights(SIZES)),
        ("sink in every part", sink_weights(SIZES)),
        ("second group's sinks", empty_rows(SIZES, sinks=True)),
        ("softcap dropped", softcap_edge(SIZES)),
        ("ALiBi dropped", alibi_edge(SIZES)),
        ("undeclared f16", constant_v(InputSizes(n_kv=(1000,)))),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_the_probe_made_for_a_fault_sees_it(fault: str, probe: Probe) -> None:
    kernel = next(f for f in FAULTS if f.name == fault).build()
    assert check(probe, kernel)


OFFSETS = ["offset 3 x 0.6931", "offset 3 x 0.6931, f16 sums", "offset 3", "offset ln 8", "lazy rescale"]


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("keys", [150, 600])
def test_an_offset_on_the_maximum_is_no_fault(name: str, keys: int) -> None:
    """Whether it is stated or not: the largest P is 0.1250177 in l, and 0.125 in the numerator."""
    kernel = next(v for v in VARIANTS if v.name == name).build()
    off = 0
    for probe in standard_probes(InputSizes(n_kv=(keys, 65, 1), edges=(64, 128))):
        result = kernel.run(probe.call)
        for arithmetic in (kernel.arithmetic_of(probe.call), loosest("f16")):
            assert [str(f) for f in judge(probe, result, arithmetic)] == []
        if probe.demand == "bits" and probe.out is not None:
            off += not torch.equal(result.out.double(), probe.out)
    # Bits would have been too much to ask for.
    assert off == 0 if name == "lazy rescale" else off > 0


@pytest.mark.parametrize("assumed", [loosest("f16"), loosest("bf16")], ids=["f16", "bf16"])
@pytest.mark.parametrize("key", [0, 63, 149])
def test_another_keys_value_is_seen_though_no_bits_are_due(key: int, assumed: Arithmetic) -> None:
    probe = one_hot(SIZES)
    kernel = build_kernel("eager:kv=3")
    probe.call.v[:, key, 1] = probe.call.v[:, (key + 1) % 150, 1]
    failures = judge(probe, kernel.run(probe.call), assumed, most=1000)
    assert {failure.key for failure in failures} == {key}


def test_unequal_counts_are_what_shows_the_base() -> None:
    """With as many keys in either part, weights are equal in every base: this is how the bug passed."""
    kernel = next(f for f in FAULTS if f.name == "base-2 merge").build()
    two = InputSizes(n_kv=(128,), edges=(64,))
    kernel.plan = kernel.plan.__class__(kv=kernel.plan.kv.__class__("parts", 2))  # type: ignore[attr-defined]
    assert {f.what for f in check(counted(two, 64, 3, 3), kernel)} == {"lse"}
    assert "column 0" in {f.what for f in check(counted(two, 64, 1, 3), kernel)}


def test_a_failing_kernel_is_a_failure_and_no_error() -> None:
    from verify.kernels.errors import KernelFailure

    class Dies(EagerKernel):
        def run(self, call: object) -> object:  # type: ignore[override]
            raise KernelFailure("died", "it died")

    (failure,) = check(last_key_edge(SIZES), Dies("dies", build_kernel("eager").options))  # type: ignore[attr-defined]
    assert "it died" in str(failure) and math.isnan(failure.got)


def test_what_the_denominator_sums_is_relied_on_only_where_it_is_stated() -> None:
    """Elsewhere it is the looser of both that is taken, and beside a constant V that one is the other."""
    call = constant_v(InputSizes(n_kv=(1101,))).call
    stated, unstated = Arithmetic(l_from_rounded_p=True), Arithmetic()
    size = call.v[:, 0, :1].double().abs()[:, None]
    rounding = 2.0**-11 * size
    assert bool((constant_bound(call, stated) < rounding).all())
    for arithmetic in (
        unstated,
        replace(stated, identified=True),
        replace(stated, stated=False),
        replace(stated, stated=False, identified=True),
    ):
        assert bool((constant_bound(call, arithmetic) >= rounding).all())
