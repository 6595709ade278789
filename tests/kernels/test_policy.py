"""Policies at their thresholds: the last length before, the first that counts, the one after.

Engines pad the visible keys to 256 before they compare, so a threshold T is met from T - 255 keys (>=), and
passed from T + 1 (>).
"""

from __future__ import annotations

import pytest

from verify.kernels.errors import SpecError
from verify.kernels.plans.plan import KVCuts, Plan
from verify.kernels.plans.policy import N_KV_PADDING, POLICIES, CallShape, policy_named

GLM = CallShape(12, 8, 128, 128, 1, 8192, "f16", False, False, 1, "layer")
MLA = CallShape(20, 1, 576, 512, 1, 8192, "f16", False, False, 1, "layer")
SPLIT, WHOLE = ((8, 4), "each"), ((4, 4, 4), "one")


def chosen(policy: str, call: CallShape, **change: object) -> tuple[tuple[int, ...], str]:
    return policy_named(policy).head_groups(call._replace(**change))  # type: ignore[arg-type]


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


def test_a_moved_threshold_moves_every_rule_in_its_own_units() -> None:
    moved = policy_named("ik-1183").with_threshold(512)
    found = [moved.head_groups(GLM._replace(n_kv=n)) for n in (256, 257, 258)]
    assert found == [WHOLE, SPLIT, SPLIT]
    graph = GLM._replace(gpus=4, split_mode="graph")
    found = [moved.head_groups(graph._replace(n_kv=n)) for n in (1792, 1793, 1794)]
    assert found == [WHOLE, SPLIT, SPLIT]


def test_a_policy_in_a_plan_moves_the_automatic_cuts_with_the_groups() -> None:
    plan = Plan(policy=policy_named("ik-1183"), kv=KVCuts("auto"))
    rows = [plan.at(n, ratio=12, kv_heads=8, k_size=128, v_size=128) for n in (7936, 7937)]
    assert [(row.head_groups, row.launch, len(row.cuts) - 1) for row in rows] == [
        ((4, 4, 4), "one", 5),
        ((8, 4), "each", 8),
    ]


def test_an_unknown_policy_is_named_with_the_nearest() -> None:
    with pytest.raises(SpecError, match="policy=ik1183: unknown policy, did you mean 'ik-1183'"):
        policy_named("ik1183")
