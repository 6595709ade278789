"""One head that stands apart from the others, whatever its arithmetic allows for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from verify.kernels.budget.arithmetic import loosest
from verify.kernels.call import AttentionOutput
from verify.kernels.faults import VARIANTS
from verify.kernels.heads import Heads
from verify.kernels.judging.apart import TIMES, HeadApart, head_apart, tail
from verify.kernels.judging.detectors import Measures, findings, measure
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel
from verify.kernels.trace import Launched, Signature, heads_launched_alike

HEADS = Heads(8, 2, 32, 32)


def drawn(count: int, heads: int, unlike: float, groups: int = 1) -> Iterator[HeadApart]:
    """Gains of right kernels: of known deviations, with a common factor and one a group."""
    g = torch.Generator().manual_seed(heads)
    for _ in range(count):
        deviations = torch.exp(unlike * torch.randn(heads, generator=g, dtype=torch.float64))
        gains = 3.0 + deviations * torch.randn(heads, generator=g, dtype=torch.float64)
        gains += torch.randn(groups, generator=g, dtype=torch.float64).repeat_interleave(heads // groups)
        found = head_apart(gains, deviations, chance=0.02)
        assert found is not None
        yield found


@pytest.mark.parametrize("heads", [8, 24])
def test_chance_does_so_no_more_often_than_is_said(heads: int) -> None:
    """Half the limit is where the bound of the tail lies: of normal gains of like deviations nearly as many
    pass it. Of unlike ones, and where KV heads have biases of their own, none pass the limit."""
    beyond = [abs(f.shift) * TIMES > f.limit for f in drawn(3000, heads, 0.05)]
    assert 0.013 < sum(beyond) / 3000 < 0.0275
    for unlike, groups in ((1.0, 1), (0.5, 4)):
        assert sum(abs(f.shift) > f.limit for f in drawn(1000, heads, unlike, groups)) <= 3


def test_the_tail_bounds_students() -> None:
    """Against the density's integral, by the trapezium rule."""
    for degrees, x in ((6, 10.0), (6, 20.0), (22, 6.0)):
        t = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:] ** -1 * x
        log_c = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
        density = torch.exp(log_c - (degrees + 1) / 2 * torch.log1p(t.square() / degrees))
        exact = -float(torch.trapezoid(density, t))
        assert exact < tail(x, degrees) < 1.25 * exact


def figures(family: str, spec: str, *, factors: dict[int, float], alike: bool = True) -> Measures:
    call = draw(family, InputSizes(n_kv=(300, 299, 298, 297), heads=HEADS), 0)
    kernel = build_kernel(spec)
    result = kernel.run(call)
    out = result.out.double()
    for head, factor in factors.items():
        out[:, :, head] *= factor
    # What is stated of it: the loosest.
    arithmetic = build_kernel("eager:acc=f16").arithmetic_of(call)
    return measure(
        call, AttentionOutput(out.float(), result.lse), arithmetic, distinct=True, heads_alike=alike
    )


def test_a_head_of_its_own_factor_is_named() -> None:
    off = figures("gaussian", "eager", factors={5: 1.004})
    assert off.apart > off.apart_limit and off.apart_head == 5
    said = [f.said for f in findings(off._replace(head_gain=0.0, gain=0.0)) if f.detector == "gain"]
    assert said and "head 5 is off by a common factor of 1 +0.00" in said[0]
    # Heads that are off together are another plan for a group, or a common factor: both are others' to see.
    for factors in ({}, {5: 1.004, 6: 1.004}, dict.fromkeys(range(8), 1.004)):
        assert not (found := figures("gaussian", "eager", factors=factors)).apart > found.apart_limit
    # Nothing is asked where heads differ by what they are given, or nobody says that they are alike.
    for family, alike in (("sinks", True), ("alibi", True), ("gaussian", False)):
        assert math.isnan(figures(family, "eager", factors={5: 1.004}, alike=alike).apart)


@pytest.mark.parametrize("spec", ["eager", "eager:acc=f16", "eager:p=bf16,out=bf16"])
def test_right_kernels_have_none_in_any_family(spec: str) -> None:
    for family in FAMILIES.values():
        if family.distinct:
            found = figures(family.name, spec, factors={})
            assert not found.apart > found.apart_limit, (family.name, found)


def test_a_head_with_a_launch_of_its_own_may_be_another_arithmetic() -> None:
    def rows(*groups: int) -> Launched:
        signature = Signature(kernel="k", binary="", head_groups=groups, cuts=(), launch="each", tokens=1)
        return Launched(Counter({("decode", 300, signature): 1}))

    assert all(heads_launched_alike(rows(*groups).rows) for groups in ((), (12,), (8, 4), (1, 1, 1)))
    assert not heads_launched_alike(rows(11, 1).rows)


@pytest.mark.parametrize("stated", [True, False])
def test_a_maximum_that_lags_in_some_heads_is_no_fault_of_theirs(stated: bool) -> None:
    """One heavy key a row: where the maximum lags behind it P is rounded, elsewhere it is 1."""
    kernel = next(v for v in VARIANTS if v.name == "lazy rescale").build()
    call = draw("needles", InputSizes(n_kv=(257, 200, 64, 1, 0), batch=2), 4)
    result, own = kernel.run(call), kernel.arithmetic_of(call)
    arithmetic = own if stated else replace(loosest("f16"), out=own.out)
    found = measure(call, result, arithmetic, distinct=True, heads_alike=True)
    assert 2e-6 < found.apart < found.apart_limit < 1e-3
    assert [f for f in findings(found) if f.detector == "gain"] == []
    # What rounding cannot make of one head is seen beside it.
    out = result.out.double()
    out[:, :, 5] *= 1.001
    off = measure(call, AttentionOutput(out.float(), result.lse), arithmetic, distinct=True, heads_alike=True)
    assert off.apart_head == 5 and off.apart > off.apart_limit
