"""Policies at their thresholds: the last length before, the first that counts, the one after.

Engines pad the visible keys to 256 before they compare, so a threshold T is met from T - 255 keys (>=), and
passed from T + 1 (>).
"""

from __future__ import annotations

from typing import Any

import pytest

from verify.kernels.errors import SpecError
from verify.kernels.heads import Heads
from verify.kernels.plans.asked import N_KV_PADDING, RowAsked
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.policy import KERNEL_SUMS, POLICIES, EngineLaunch, Policy, policy_named

GLM = RowAsked(Heads(96, 8, 128, 128), n_kv=8192)
MLA = RowAsked(Heads(20, 1, 576, 512), n_kv=8192)
SPLIT, WHOLE = ((8, 4), "each"), ((4, 4, 4), "one")


def changed(call: RowAsked, **change: Any) -> RowAsked:
    """Other facts; of its heads `ratio`, `k_size` and `v_size`."""
    sizes = {name: change.pop(name) for name in ("k_size", "v_size") if name in change}
    q = change.pop("ratio", call.ratio) * call.kv_heads
    return call._replace(heads=call.heads._replace(q=q, **sizes), **change)


def chosen(policy: str, call: RowAsked, **change: Any) -> tuple[tuple[int, ...], str]:
    return policy_named(policy).head_groups(changed(call, **change))


@pytest.mark.parametrize(
    ("policy", "gpus", "split_mode", "n_kv"),
    [
        ("ik-1183", 1, "layer", 8192),
        ("ik-1183", 4, "layer", 8192),
        ("ik-1183", 1, "graph", 8192),
        ("ik-1183", 2, "graph", 16_384),
        ("ik-1183", 4, "graph", 32_768),
        ("ik-1183", 8, "graph", 65_536),
        ("ik-1190", 1, "layer", 8192),
        ("ik-1190", 2, "graph", 16_384),
        ("ik-1190", 4, "graph", 32_768),
        ("ik-1190", 8, "graph", 65_536),
        ("ik-1192", 4, "graph", 32_768),
    ],
)
def test_the_split_of_12_heads_begins_at_its_threshold(
    policy: str, gpus: int, split_mode: str, n_kv: int
) -> None:
    first = n_kv - N_KV_PADDING + 1
    found = [
        chosen(policy, GLM, gpus=gpus, split_mode=split_mode, n_kv=n) for n in (first - 1, first, first + 1)
    ]
    assert found == [WHOLE, SPLIT, SPLIT]
    assert chosen(policy, GLM, gpus=gpus, split_mode=split_mode, n_kv=n_kv) == SPLIT


@pytest.mark.parametrize("policy", ["ik-1182", "ik-1183", "ik-1190"])
def test_the_mla_split_begins_above_its_threshold(policy: str) -> None:
    found = [chosen(policy, MLA, n_kv=n) for n in (8191, 8192, 8193)]
    assert found == [((4,) * 5, "one"), ((4,) * 5, "one"), ((16, 4), "views")]


@pytest.mark.parametrize("n_kv", [1, 8191, 8192, 8193, 131_072])
def test_policies_without_a_threshold_are_the_same_at_every_length(n_kv: int) -> None:
    assert chosen("before", GLM, n_kv=n_kv) == WHOLE
    assert chosen("ik-1182", GLM, n_kv=n_kv) == WHOLE
    assert chosen("ik-1193", GLM, n_kv=n_kv) == ((12,), "one")
    assert chosen("mainline", GLM, n_kv=n_kv) == ((8, 4), "one")
    assert chosen("ik-1192", MLA, n_kv=n_kv) == ((20,), "one")
    assert chosen("mainline", MLA, n_kv=n_kv) == ((8, 8, 4), "one")


@pytest.mark.parametrize(
    ("change", "split_by"),
    [
        ({"sinks": True}, {"ik-1190"}),
        ({"sliding_window": True}, {"ik-1190"}),
        ({"cache_type": "q8_0"}, {"ik-1190"}),
        ({"n_q": 2}, set()),
        ({"ratio": 8}, set()),
        ({"k_size": 64, "v_size": 64}, {"ik-1183", "ik-1190"}),
    ],
)
def test_what_a_rule_asks_beside_the_length(change: dict[str, object], split_by: set[str]) -> None:
    found = {policy for policy in ("ik-1183", "ik-1190") if chosen(policy, GLM, **change) == SPLIT}
    assert found == split_by


def test_head_size_64_falls_back_to_the_split_in_the_backend() -> None:
    assert chosen("ik-1193", GLM, k_size=64, v_size=64) == SPLIT


@pytest.mark.parametrize(
    ("ratio", "groups"), [(1, (1,)), (5, (1,) * 5), (6, (2, 2, 2)), (16, (8, 8)), (20, (4,) * 5)]
)
def test_before_is_the_largest_power_of_two_that_divides(ratio: int, groups: tuple[int, ...]) -> None:
    assert chosen("before", GLM, ratio=ratio) == (groups, "one")


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("ratio", [1, 3, 12, 20, 64])
def test_head_groups_always_sum_to_the_ratio(name: str, ratio: int) -> None:
    for call in (GLM, MLA):
        assert sum(chosen(name, call, ratio=ratio)[0]) == ratio


MAINLINE, IK = policy_named("mainline-2026-10"), policy_named("ik-2026-08")


def around(policy: Policy, call: RowAsked, n_kv: int) -> list[EngineLaunch]:
    """What is launched at the last length before a padded threshold, at the first from it, and the next."""
    first = n_kv - N_KV_PADDING + 1
    return [policy.launched(call._replace(n_kv=n)) for n in (first - 1, first, first + 1)]


def test_mainline_leaves_the_vector_kernel_at_exactly_8192_keys() -> None:
    below, at, above = around(MAINLINE, GLM, 8192)
    assert (below.kernel, below.head_groups) == ("vector", (1,) * 12)
    assert (at.kernel, at.head_groups, at.columns) == ("mma", (8, 4), (8, 8))
    assert above == at
    assert KERNEL_SUMS[below.kernel] == "float32" and KERNEL_SUMS[at.kernel] == "float16"
    # A call cut into 8 + 4 heads runs its half of 4 in the vector kernel on both sides.
    assert {x.kernel for x in around(MAINLINE, changed(GLM, ratio=4), 8192)} == {"vector"}
    # Where the vector kernel never was, nothing changes there.
    for change in ({"generation": "ampere"}, {"n_q": 2}, {"sequences": 2}, {"k_size": 256, "v_size": 256}):
        assert {x.kernel for x in around(MAINLINE, changed(GLM, **change), 8192)} == {"mma"}, change
    # Not grouped (ALiBi), or a quantised cache: the vector kernel at any length.
    for change in ({"alibi": True}, {"cache_type": "q8_0"}, {"cache_type": "q8_0", "n_q": 2}):
        assert {x.kernel for x in around(MAINLINE, changed(GLM, **change), 8192)} == {"vector"}, change
    for generation, n_q, kernel in (("ampere", 1, "vector"), ("ampere", 2, "mma"), ("ada", 3, "mma")):
        call = changed(GLM, cache_type="q4_0", generation=generation, n_q=n_q)
        assert MAINLINE.launched(call).kernel == kernel


@pytest.mark.parametrize(
    ("generation", "n_q", "n_kv", "columns"),
    [
        ("turing", 4, 16_384, (16, 16)),
        ("turing", 4, 16_385, (32,)),
        ("ampere", 1, 16_640, (32,)),
        ("ampere", 5, 1024, (4,) * 5),
        ("ada", 4, 100_000, (16, 16)),
        ("hopper", 5, 100_000, (4,) * 5),
        ("blackwell", 1, 65_280, (4,) * 5),
        ("blackwell", 1, 65_281, (16, 16)),
        ("blackwell", 5, 65_536, (4,) * 5),
    ],
)
def test_mainlines_mla_by_generation(generation: str, n_q: int, n_kv: int, columns: tuple[int, ...]) -> None:
    call = changed(MLA, generation=generation, n_q=n_q, n_kv=n_kv)
    assert MAINLINE.launched(call).columns == columns


@pytest.mark.parametrize(
    ("sizes", "ratio", "kernel", "groups"),
    [
        ((128, 128), 3, "mma", (3,)),
        ((128, 128), 2, "mma", (2,)),
        ((128, 128), 1, "mma", (1,)),
        ((128, 128), 20, "mma", (8, 8, 4)),
        ((80, 80), 5, "mma", (5,)),
        ((512, 512), 8, "mma", (8,)),
        ((512, 512), 1, "none", (1,)),
        ((576, 512), 16, "mma", (16,)),
        ((576, 512), 12, "mma", (4, 4, 4)),
        ((192, 128), 16, "mma", (16,)),
        ((192, 128), 8, "mma", (8,)),
        ((192, 128), 5, "none", (5,)),
        ((320, 256), 32, "mma", (32,)),
        ((320, 256), 16, "none", (16,)),
        ((160, 160), 4, "none", (4,)),
        ((40, 40), 4, "unknown", (4,)),
        ((256, 128), 4, "none", (4,)),
    ],
)
def test_mainlines_groups_of_a_prompt_by_head_size(
    sizes: tuple[int, int], ratio: int, kernel: str, groups: tuple[int, ...]
) -> None:
    call = changed(GLM, k_size=sizes[0], v_size=sizes[1], ratio=ratio, n_q=512)
    found = MAINLINE.launched(call)
    assert (found.kernel, found.head_groups) == (kernel, groups)


@pytest.mark.parametrize(
    ("change", "kernel", "columns"),
    [
        ({}, "mma", (16,)),
        ({"ratio": 6}, "mma", (8,)),
        ({"ratio": 10}, "mma", (16,)),
        ({"ratio": 16}, "mma", (16,)),
        ({"n_q": 2}, "mma", (4, 4, 4)),
        ({"ratio": 6, "k_size": 256, "v_size": 256}, "mma", (8,)),
        ({"ratio": 5, "sliding_window": True}, "vector", (1,) * 5),
        ({"ratio": 5, "sliding_window": True, "cache_type": "q8_0"}, "mma", (1,) * 5),
        ({"ratio": 5, "sliding_window": True, "n_q": 2}, "mma", (1,) * 5),
        # r = 12 with a window: its own padded launch comes first.
        ({"sliding_window": True}, "mma", (16,)),
        ({"key_list": True}, "gather", (16,)),
        ({"generation": "pascal", "n_q": 8}, "vector", (1,) * 12),
        ({"generation": "pascal", "n_q": 9}, "unknown", (16,)),
        ({"k_size": 512, "v_size": 512, "ratio": 2}, "mma", (2,)),
        ({"k_size": 512, "v_size": 512, "ratio": 3}, "none", (4,)),
        ({"k_size": 320, "v_size": 256, "ratio": 32}, "mma", (16, 16)),
        ({"k_size": 320, "v_size": 256, "ratio": 8}, "none", (8,)),
        ({"k_size": 192, "v_size": 128, "ratio": 5}, "mma", (1,) * 5),
        ({"k_size": 192, "v_size": 128, "ratio": 40}, "mma", (8,) * 5),
    ],
)
def test_ik_of_2026_08_by_shape(change: dict[str, object], kernel: str, columns: tuple[int, ...]) -> None:
    found = IK.launched(changed(GLM, **change))
    assert (found.kernel, found.columns) == (kernel, columns)


@pytest.mark.parametrize(
    ("change", "below", "at"),
    [
        ({}, (4,) * 5, (16, 16)),
        ({"n_q": 4}, (4,) * 5, (16, 16)),
        ({"generation": "ampere"}, (4,) * 5, (32,)),
        ({"ratio": 12}, (4,) * 3, (16,)),
        ({"ratio": 24}, (8,) * 3, (16, 16)),
        ({"n_q": 5}, (4,) * 5, (4,) * 5),
        ({"ratio": 16}, (16,), (16,)),
    ],
)
def test_ik_of_2026_08_groups_mla_from_2048_keys(
    change: dict[str, object], below: tuple[int, ...], at: tuple[int, ...]
) -> None:
    found = around(IK, changed(MLA, **change), 2048)
    assert [x.columns for x in found] == [below, at, at]


def test_ik_of_2026_08_ends_on_mla_with_an_odd_ratio() -> None:
    assert IK.launched(changed(MLA, ratio=6, n_kv=100)).kernel == "none"


def test_a_moved_threshold_of_mainline_moves_no_rule_without_one() -> None:
    moved = MAINLINE.with_threshold(512)
    assert [x.kernel for x in around(moved, GLM, 512)] == ["vector", "mma", "mma"]
    assert moved.launched(changed(MLA, n_kv=4096)).columns == (16, 16)


def test_a_moved_threshold_moves_every_rule_in_its_own_units() -> None:
    moved = policy_named("ik-1183").with_threshold(512)
    found = [moved.head_groups(changed(GLM, n_kv=n)) for n in (256, 257, 258)]
    assert found == [WHOLE, SPLIT, SPLIT]
    graph = changed(GLM, gpus=4, split_mode="graph")
    found = [moved.head_groups(graph._replace(n_kv=n)) for n in (1792, 1793, 1794)]
    assert found == [WHOLE, SPLIT, SPLIT]


def test_a_policy_in_a_plan_moves_the_automatic_cuts_with_the_groups() -> None:
    plan = Plan(policy=policy_named("ik-1183"), kv=KVCuts("auto"))
    rows = [plan.at(GLM.of_keys(n)) for n in (7936, 7937)]
    assert [(row.head_groups, row.launch, len(row.cuts) - 1) for row in rows] == [
        ((4, 4, 4), "one", 5),
        ((8, 4), "each", 8),
    ]


def test_an_unknown_policy_is_named_with_the_nearest() -> None:
    with pytest.raises(SpecError, match="policy=ik1183: unknown policy, did you mean 'ik-1183'"):
        policy_named("ik1183")
