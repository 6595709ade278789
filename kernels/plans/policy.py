"""Policies: which head groups a given version of an engine launches for a given call.

Each policy is data: an ordered list of rules, the first whose conditions hold decides; if none does, the
policy's fallback. The conditions are those of the pull requests they are named after, in ik_llama.cpp's CUDA
flash attention, and of llama.cpp (`mainline`). Sizes are of one GPU: split mode `graph` shares the KV heads
out over the GPUs, split mode `layer` leaves them whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from verify.kernels.errors import SpecError, nearest

# One launch for all head groups; or one a group, on contiguous copies of Q (`each`) or on views (`views`).
Launch = Literal["one", "each", "views"]
SplitMode = Literal["layer", "graph"]
SPLIT_MODES: tuple[SplitMode, ...] = ("layer", "graph")

# Engines pad the visible keys of a call up to a multiple of this.
N_KV_PADDING = 256


class CallShape(NamedTuple):
    """What a policy looks at. kv_heads is the model's; `kv_heads_a_gpu` is what a rule compares."""

    ratio: int
    kv_heads: int
    k_size: int
    v_size: int
    n_q: int
    n_kv: int
    cache_type: str
    sinks: bool
    sliding_window: bool
    gpus: int
    split_mode: SplitMode

    @property
    def kv_heads_a_gpu(self) -> int:
        return max(self.kv_heads // self.gpus, 1) if self.split_mode == "graph" else self.kv_heads

    @property
    def n_kv_padded(self) -> int:
        return -(-self.n_kv // N_KV_PADDING) * N_KV_PADDING

    @property
    def mla(self) -> bool:
        return self.k_size == 576 and self.v_size == 512


def power_of_two_groups(ratio: int) -> tuple[int, ...]:
    """One launch, groups of the largest power of two up to 8 that divides r: 12 is (4, 4, 4)."""
    size = max(n for n in (1, 2, 4, 8) if ratio % n == 0)
    return (size,) * (ratio // size)


def groups_of_eight(ratio: int) -> tuple[int, ...]:
    """Groups of 8 and a remainder (padded to 8 in the kernel): 12 is (8, 4)."""
    return (8,) * (ratio // 8) + ((ratio % 8,) if ratio % 8 else ())


class Rule(NamedTuple):
    """If `applies(call, threshold)`, these head groups are launched in this way.

    threshold: compared with the padded n_kv, or with padded n_kv * KV heads a GPU, as `applies` does.
    """

    applies: Callable[[CallShape, int], bool]
    head_groups: tuple[int, ...]
    launch: Launch
    threshold: int = 0


@dataclass(frozen=True)
class Policy:
    """rules: first match decides; fallback: head groups of every other call, one launch.

    `with_threshold` moves every rule's threshold, so that a policy can be studied on a short context.
    """

    name: str
    summary: str
    rules: tuple[Rule, ...] = ()
    fallback: Callable[[int], tuple[int, ...]] = power_of_two_groups

    def head_groups(self, call: CallShape) -> tuple[tuple[int, ...], Launch]:
        for rule in self.rules:
            if rule.applies(call, rule.threshold):
                return rule.head_groups, rule.launch
        return self.fallback(call.ratio), "one"

    def with_threshold(self, threshold: int) -> Policy:
        return replace(self, rules=tuple(rule._replace(threshold=threshold) for rule in self.rules))


def _ratio_12_decode(call: CallShape) -> bool:
    return call.ratio == 12 and call.n_q == 1


def _ik_1182(call: CallShape, threshold: int) -> bool:
    return call.mla and call.ratio == 20 and call.n_q == 1 and call.n_kv_padded > threshold


def _ik_1183(call: CallShape, threshold: int) -> bool:
    if not _ratio_12_decode(call) or call.sinks or call.sliding_window or call.cache_type != "f16":
        return False
    if call.split_mode == "graph":
        # 65,536 = 8,192 keys on each of the 8 KV heads of the models it was written for.
        return call.n_kv_padded * call.kv_heads_a_gpu >= 8 * threshold
    return call.n_kv_padded >= threshold


def _ik_1190(call: CallShape, threshold: int) -> bool:
    return _ratio_12_decode(call) and call.n_kv_padded * call.kv_heads_a_gpu >= threshold


def _mla_20(call: CallShape, threshold: int) -> bool:
    return call.mla and call.ratio == 20 and call.n_q == 1


def _ik_1193(call: CallShape, threshold: int) -> bool:
    return call.k_size == 128 and _ratio_12_decode(call)


_MLA_SPLIT = Rule(_ik_1182, (16, 4), "views", 8192)
_MLA_PADDED = Rule(_mla_20, (20,), "one")
_SPLIT_ON_COPIES = Rule(_ik_1183, (8, 4), "each", 8192)
_SPLIT_IN_BACKEND = Rule(_ik_1190, (8, 4), "each", 65536)
_PADDED = Rule(_ik_1193, (12,), "one")

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("before", "groups of the largest power of two up to 8 that divides r, one launch"),
        Policy("ik-1182", "MLA with r = 20: 16+4 in two launches from n_kv > 8192", (_MLA_SPLIT,)),
        Policy(
            "ik-1183",
            "r = 12, f16 cache: 8+4 in two launches on copies of Q from n_kv >= 8192"
            " (split mode graph: n_kv * KV heads >= 65536)",
            (_SPLIT_ON_COPIES, _MLA_SPLIT),
        ),
        Policy(
            "ik-1190",
            "r = 12, any cache: 8+4 in two launches from n_kv * KV heads >= 65536",
            (_SPLIT_IN_BACKEND, _MLA_SPLIT),
        ),
        Policy(
            "ik-1192",
            "as ik-1190, and MLA with r = 20 in one padded launch",
            (_SPLIT_IN_BACKEND, _MLA_PADDED),
        ),
        Policy(
            "ik-1193",
            "head size 128, r = 12: one launch, 12 heads padded to 16 columns, at any n_kv",
            (_PADDED, _SPLIT_IN_BACKEND, _MLA_PADDED),
        ),
        Policy("mainline", "groups of 8, a remainder padded to 8, one launch", (), groups_of_eight),
    )
}


def policy_named(name: str) -> Policy:
    """Raises SpecError naming the nearest known policy."""
    if name not in POLICIES:
        raise SpecError(
            f"policy={name}: unknown policy{nearest(name, POLICIES)} (known: {', '.join(POLICIES)})"
        )
    return POLICIES[name]
