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


# Microseconds by parts, at so many keys and KV heads (H200, 12 query heads a KV head of 128 numbers).
SWEPT = {
    (1024, 8): {4: 6.2, 6: 5.93, 8: 5.52, 10: 6.61, 12: 6.57, 14: 6.63, 16: 6.12},
    (2048, 8): {4: 9.02, 6: 8.02, 8: 6.94, 10: 7.42, 12: 7.18, 14: 7.3, 16: 7.38},
    (4096, 8): {4: 14.72, 6: 11.62, 8: 9.84, 10: 9.89, 12: 9.61, 14: 9.18, 16: 8.88},
    (16384, 8): {4: 48.82, 6: 34.38, 8: 27.49, 10: 24.5, 12: 22.71, 14: 21.76, 16: 20.63},
    (4096, 1): {8: 8.8, 12: 7.59, 16: 6.39, 24: 5.87, 32: 5.3, 48: 6.6, 64: 6.08},
    (16384, 1): {16: 15.03, 24: 11.76, 32: 9.86, 48: 9.79, 64: 8.9, 66: 9.64, 132: 12.64},
}


@pytest.mark.parametrize(("n_kv", "kv_heads"), SWEPT)
def test_auto_is_within_5_percent_of_the_best_that_was_measured(n_kv: int, kv_heads: int) -> None:
    us = SWEPT[n_kv, kv_heads]
    parts = len(KVCuts("auto", 0).cuts(n_kv, 64, kv_heads, 132)) - 1
    assert us[parts] <= 1.05 * min(us.values()), parts


@given(st.integers(1, 4000), st.integers(1, 140), st.sampled_from((0, 10, 20)))
def test_auto_never_takes_fewer_parts_of_more_keys(tiles: int, programs: int, to_fill: int) -> None:
    auto = KVCuts("auto", to_fill)
    cuts, longer = (auto.cuts(64 * n, 64, programs, 132) for n in (tiles, tiles + 1))
    assert len(cuts) <= len(longer) <= max(132 // programs, 1) + 1


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
