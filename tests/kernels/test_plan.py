from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verify.kernels.errors import SpecError
from verify.kernels.heads import Heads
from verify.kernels.plans.asked import RowAsked
from verify.kernels.plans.plan import KVCuts, Plan, parse_heads, powers_of_two
from verify.kernels.plans.spec import with_options
from verify.kernels.registry import build_kernel

TWELVE = RowAsked(Heads(96, 8, 128, 128), n_kv=8192)


def test_a_number_of_parts_is_that_number_where_there_are_tiles_for_it() -> None:
    assert KVCuts("parts", 4).cuts(1024, 64, 1, 132) == (0, 256, 512, 768, 1024)
    assert KVCuts("parts", 4).cuts(100, 64, 1, 132) == (0, 64, 100)


def test_auto_moves_with_the_head_groups() -> None:
    padded = Plan(kv=KVCuts("auto", 0)).at(TWELVE)
    split = Plan(heads=(8, 4), kv=KVCuts("auto", 0)).at(TWELVE)
    assert len(padded.cuts) > len(split.cuts) > 2


@given(st.integers(1, 64))
def test_split_is_powers_of_two_that_sum(r: int) -> None:
    groups = powers_of_two(r)
    assert sum(groups) == r
    assert all(g & (g - 1) == 0 for g in groups)
    assert list(groups) == sorted(groups, reverse=True)


def test_head_groups_that_do_not_sum_are_refused() -> None:
    with pytest.raises(ValueError, match=r"heads=8\+4: sums to 12, expected r = 3"):
        Plan(heads=(8, 4)).at(RowAsked(Heads(24, 8, 128, 128), n_kv=1))


@pytest.mark.parametrize("text", ["8+", "a", "0", "8+-1", ""])
def test_head_groups_that_are_no_numbers_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="head groups"):
        parse_heads(text)


def test_options_that_replace_a_policy_or_give_way_to_one() -> None:
    assert with_options("flash:heads=split,kv=2,out=f16", {"policy": "ik-1183", "gpus": "2"}) == (
        "flash:kv=2,out=f16,policy=ik-1183,gpus=2"
    )
    own = "flash:policy=ik-1183,threshold=512,gpus=2,split_mode=graph,kv=3"
    assert with_options(own, {"heads": "8+4"}) == "flash:kv=3,heads=8+4"
    assert with_options(own, {"block": "16"}) == own + ",block=16"
    assert with_options("sdpa:math", {}) == "sdpa:math"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("flahs", "unknown kernel 'flahs', did you mean 'flash'"),
        ("flash:hads=8+4", "unknown option 'hads', did you mean 'heads'"),
        ("flash:heads", "'heads' is not of the form option=value"),
        ("flash:kv=0", "kv=0: expected a number of parts"),
        ("flash:kv=1,kv=2", "option kv is given twice"),
        ("flash:block=20", "multiple of 16"),
        ("flash:p=f8", "p=f8, expected one of f16, bf16, f32"),
        ("flash:policy=ik1183", "unknown policy, did you mean 'ik-1183'"),
        ("flash:policy=ik-1183,heads=8+4", "heads is chosen by the policy"),
        ("flash:threshold=5", "threshold needs policy"),
        ("exact:heads=2", "unknown option 'heads'"),
    ],
)
def test_specifications_that_cannot_be_built_say_why(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=r"kernel|policy") as caught:
        build_kernel(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
