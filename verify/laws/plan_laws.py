"""Laws of plans: how a call is cut up, before anything is computed."""

from __future__ import annotations

from hypothesis import strategies as st

from verify.kernels.heads import Heads
from verify.kernels.plans.asked import N_KV_PADDING, RowAsked
from verify.kernels.plans.plan import RowPlan
from verify.kernels.plans.policy import POLICIES
from verify.laws.cases import Rule
from verify.laws.draws import compositions
from verify.laws.law import LawBroken, Subject, laws, no_plans

EQUAL = "equality"
HEAD_SIZE = 128
law = laws("plans", EQUAL, unless=no_plans)


@st.composite
def rules(draw: st.DrawFn, subject: Subject) -> Rule:
    """Plans of all kinds, on short and long rows."""
    policy = draw(st.one_of(st.just(""), st.sampled_from(list(POLICIES))))
    # A rule that names no head groups has those of the subject, which may be for one ratio alone.
    own = subject.capabilities.ratios
    ratios = st.one_of(st.sampled_from([1, 12, 8]), st.integers(1, 64))
    ratio = draw(st.sampled_from(own) if own else ratios)
    heads = (
        "" if policy else draw(st.one_of(st.just(""), st.just("split"), compositions(ratio).map(_written)))
    )
    parts = st.one_of(
        st.integers(1, 40).map(str), st.just("auto"), st.integers(1, 5000).map(lambda n: f"size:{n}")
    )
    return Rule(
        ratio=ratio,
        kv_heads=draw(st.integers(1, 16)),
        n_kv=draw(st.one_of(st.integers(0, 300), st.integers(0, 200_000))),
        heads=heads,
        kv=draw(parts),
        block=draw(st.sampled_from([64, 16, 128])),
        policy=policy,
        gpus=draw(st.sampled_from([1, 2, 4])) if policy else 1,
        split_mode=draw(st.sampled_from(["layer", "graph"])) if policy else "layer",
    )


def _written(groups: tuple[int, ...]) -> str:
    return "+".join(map(str, groups))


def _row(subject: Subject, rule: Rule, n_kv: int | None = None) -> RowPlan:
    assert subject.plan is not None
    heads = Heads(rule.ratio * rule.kv_heads, rule.kv_heads, HEAD_SIZE, HEAD_SIZE)
    return subject.plan(rule.options).at(RowAsked(heads, rule.n_kv if n_kv is None else n_kv))


@law("groups-sum", rules)
def groups_sum(subject: Subject, rule: Rule) -> float:
    """Head groups are at least one head each, and sum to r."""
    groups = _row(subject, rule).head_groups
    if sum(groups) != rule.ratio or min(groups) < 1:
        raise LawBroken(f"head groups {groups}: expected r = {rule.ratio} query heads in all")
    return 0.0


@law("cuts-partition", rules)
def cuts_partition(subject: Subject, rule: Rule) -> float:
    """Cuts partition the keys: from 0 to n_kv, each once, no part empty, on the edges of tiles."""
    cuts = _row(subject, rule).cuts
    if cuts[0] != 0 or cuts[-1] != rule.n_kv:
        raise LawBroken(f"cuts {cuts[:3]} ... {cuts[-1]}: expected 0 to n_kv = {rule.n_kv}")
    if list(cuts) != sorted(set(cuts)):
        raise LawBroken(f"cuts {cuts}: expected each once, in order")
    inside = [cut for cut in cuts[1:-1] if cut % rule.block]
    if inside:
        raise LawBroken(f"cut at {inside[0]}: expected a multiple of {rule.block} keys a tile")
    return 0.0


@st.composite
def gates(draw: st.DrawFn) -> Rule:
    """Policies that split r = 12 from a threshold on."""
    return Rule(
        ratio=12,
        kv_heads=draw(st.sampled_from([1, 2, 8, 16])),
        n_kv=draw(st.integers(1, 40_000)),
        kv="auto",
        policy=draw(st.sampled_from(["ik-1183", "ik-1190", "ik-1192"])),
        threshold=draw(st.sampled_from([512, 8192, 65_536])),
        gpus=draw(st.sampled_from([1, 2, 4])),
        split_mode=draw(st.sampled_from(["layer", "graph"])),
    )


def opens(rule: Rule) -> int:
    """The first n_kv that a policy splits at: n_kv is padded to 256, and compared with the threshold by
    itself (ik-1183), or times the KV heads of one GPU; ik-1183 under split mode graph means 8 of them."""
    shared = rule.kv_heads // rule.gpus if rule.split_mode == "graph" else rule.kv_heads
    heads, threshold = max(shared, 1), rule.threshold
    if rule.policy == "ik-1183":
        heads, threshold = (heads, 8 * threshold) if rule.split_mode == "graph" else (1, threshold)
    padded = -(-threshold // heads)
    padded = -(-padded // N_KV_PADDING) * N_KV_PADDING
    return max(padded - N_KV_PADDING + 1, 1)


@law("policy-thresholds", lambda _: gates())
def policy_thresholds(subject: Subject, rule: Rule) -> float:
    """A policy splits from exactly the length at which the engine's does, and below it never."""
    first = opens(rule)
    for n_kv in (first - 1, first, rule.n_kv):
        if n_kv < 1:
            continue
        ran = _row(subject, rule, n_kv)
        split = (ran.head_groups, ran.launch) == ((8, 4), "each")
        if split != (n_kv >= first):
            raise LawBroken(
                f"{rule.policy} at n_kv {n_kv}: head groups {ran.head_groups} in launches {ran.launch!r},"
                f" expected 8+4 from n_kv {first} on"
            )
    return 0.0
