"""Policies: which head groups a given version of an engine launches for a given call.

Each policy is data: an ordered list of rules, the first whose conditions hold decides; if none does, the
policy's fallback. The conditions are those of the pull requests they are named after, in ik_llama.cpp's CUDA
flash attention, and of llama.cpp (`mainline`); `ik-2026-08` and `mainline-2026-10` are those engines as a
whole at that time, read from their `fattn.cu`. Sizes are of one GPU: split mode `graph` shares the KV heads
out over the GPUs, split mode `layer` leaves them whole.

A rule also names the kernel, because that is where precision jumps: vector kernels sum in float32, those on
tensor cores (mma) keep P V in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from verify.kernels.errors import SpecError, nearest
from verify.kernels.plans.asked import RowAsked

# One launch for all head groups; or one a group, on contiguous copies of Q (`each`) or on views (`views`).
Launch = Literal["one", "each", "views"]
# vector: one program a query head, on ordinary cores. mma: tiles of query heads on tensor cores. gather: keys
# by index. none: the engine has no such kernel and ends. unknown: what runs there was not looked up.
EngineKernel = Literal["vector", "mma", "gather", "none", "unknown"]
# In which type P V is summed within a part.
KERNEL_SUMS: dict[EngineKernel, str] = {"vector": "float32", "mma": "float16", "gather": "float32"}


def power_of_two_groups(ratio: int) -> tuple[int, ...]:
    """One launch, groups of the largest power of two up to 8 that divides r: 12 is (4, 4, 4)."""
    size = max(n for n in (1, 2, 4, 8) if ratio % n == 0)
    return (size,) * (ratio // size)


def dividing_groups(most: int) -> Callable[[int], tuple[int, ...]]:
    """Groups of the largest power of two up to `most` that divides r: with 16, 12 is (4, 4, 4)."""

    def groups(ratio: int) -> tuple[int, ...]:
        size = most
        while ratio % size:
            size //= 2
        return (size,) * (ratio // size)

    return groups


def groups_of(size: int) -> Callable[[int], tuple[int, ...]]:
    """Groups of `size` and a remainder: with 16, 20 is (16, 4)."""
    return lambda ratio: (size,) * (ratio // size) + ((ratio % size,) if ratio % size else ())


def one_group(ratio: int) -> tuple[int, ...]:
    """All heads in one group."""
    return (ratio,)


def single_heads(ratio: int) -> tuple[int, ...]:
    """Every head for itself."""
    return (1,) * ratio


class PolicyRule(NamedTuple):
    """If `applies(call, threshold)`, these head groups are launched in this way."""

    applies: Callable[[RowAsked, int], bool]  # whether it is this rule's row
    # Themselves, or how they follow from r.
    head_groups: tuple[int, ...] | Callable[[int], tuple[int, ...]]
    launch: Launch  # of the head groups
    # Compared with the padded n_kv, or with padded n_kv * KV heads a GPU, as `applies` does.
    threshold: int = 0
    kernel: EngineKernel = "mma"  # of the engine, that runs it
    # Query heads that a tile holds, to which a group is padded; None: the next power of two.
    columns: int | None = None


class EngineLaunch(NamedTuple):
    """What a policy runs for a call. columns: each group's, padding included."""

    head_groups: tuple[int, ...]
    launch: Launch
    kernel: EngineKernel
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Policy:
    """rules: first match decides; fallback: head groups of every other call, one launch on tensor cores.

    fallback_columns: as a rule's. `with_threshold` moves every rule's threshold, so that a policy can be
    studied on a short context.
    """

    name: str
    summary: str
    rules: tuple[PolicyRule, ...] = ()
    fallback: Callable[[int], tuple[int, ...]] = power_of_two_groups
    fallback_columns: int | None = None

    @cached_property
    def _all_rules(self) -> tuple[PolicyRule, ...]:
        last = PolicyRule(lambda *_: True, self.fallback, "one", columns=self.fallback_columns)
        return (*self.rules, last)

    def rule_of(self, call: RowAsked) -> PolicyRule:
        """The one that decides: what is launched follows from it and r, whatever the length."""
        return next(r for r in self._all_rules if r.applies(call, r.threshold))

    def launched(self, call: RowAsked) -> EngineLaunch:
        """Head groups, launch, kernel and padded columns of a call."""
        rule = self.rule_of(call)
        groups = rule.head_groups(call.ratio) if callable(rule.head_groups) else rule.head_groups
        columns = tuple(max(rule.columns or 1, 1 << (g - 1).bit_length()) for g in groups)
        return EngineLaunch(groups, rule.launch, rule.kernel, columns)

    def head_groups(self, call: RowAsked) -> tuple[tuple[int, ...], Launch]:
        found = self.launched(call)
        return found.head_groups, found.launch

    def with_threshold(self, threshold: int) -> Policy:
        return replace(self, rules=tuple(rule._replace(threshold=threshold) for rule in self.rules))


def _ratio_12_decode(call: RowAsked) -> bool:
    return call.ratio == 12 and call.n_q == 1


def _ik_1182(call: RowAsked, threshold: int) -> bool:
    return call.mla and call.ratio == 20 and call.n_q == 1 and call.n_kv_padded > threshold


def _ik_1183(call: RowAsked, threshold: int) -> bool:
    if not _ratio_12_decode(call) or call.sinks or call.sliding_window or call.cache_type != "f16":
        return False
    if call.split_mode == "graph":
        # 65,536 = 8,192 keys on each of the 8 KV heads of the models it was written for.
        return call.n_kv_padded * call.kv_heads_a_gpu >= 8 * threshold
    return call.n_kv_padded >= threshold


def _ik_1190(call: RowAsked, threshold: int) -> bool:
    return _ratio_12_decode(call) and call.n_kv_padded * call.kv_heads_a_gpu >= threshold


def _mla_20(call: RowAsked, threshold: int) -> bool:
    return call.mla and call.ratio == 20 and call.n_q == 1


def _ik_1193(call: RowAsked, threshold: int) -> bool:
    return call.k_size == 128 and _ratio_12_decode(call)


_MLA_SPLIT = PolicyRule(_ik_1182, (16, 4), "views", 8192)
_MLA_PADDED = PolicyRule(_mla_20, (20,), "one")
_SPLIT_ON_COPIES = PolicyRule(_ik_1183, (8, 4), "each", 8192)
_SPLIT_IN_BACKEND = PolicyRule(_ik_1190, (8, 4), "each", 65536)
_PADDED = PolicyRule(_ik_1193, (12,), "one")


def _sizes(k_size: int, v_size: int, also: Callable[[RowAsked], bool]) -> Callable[[RowAsked, int], bool]:
    """A condition on calls with these head sizes."""
    return lambda call, threshold: call.sizes == (k_size, v_size) and also(call)


def _divisible(k_size: int, v_size: int, *sizes: int) -> tuple[PolicyRule, ...]:
    """Groups of the largest of `sizes` that divides r; no kernel where none does."""
    found = [
        PolicyRule(_sizes(k_size, v_size, lambda c, n=n: c.ratio % n == 0), groups_of(n), "one", columns=n)  # type: ignore[misc]
        for n in sizes
    ]
    return (*found, PolicyRule(_sizes(k_size, v_size, lambda c: True), one_group, "one", kernel="none"))


def _padded_decode(size: int, ratio: int, columns: int) -> PolicyRule:
    """One query token, head size `size`, r = ratio: one launch padded to `columns`."""
    applies = _sizes(size, size, lambda c: c.n_q == 1 and c.ratio == ratio)
    return PolicyRule(applies, one_group, "one", columns=columns)


def _few_mla(ratio: Callable[[RowAsked], bool]) -> Callable[[RowAsked, int], bool]:
    """MLA, up to four query tokens, from `threshold` keys."""
    return lambda c, threshold: c.mla and ratio(c) and c.n_q <= 4 and c.n_kv_padded >= threshold


def _ik_vector(call: RowAsked, threshold: int) -> bool:
    windowed = call.sliding_window and call.k_size == call.v_size <= 256
    return call.n_q == 1 and windowed and not call.quantised


_IK_2026_08 = (
    PolicyRule(lambda c, _: c.key_list, one_group, "one", kernel="gather"),
    PolicyRule(lambda c, _: c.generation == "pascal" and c.n_q <= 8, single_heads, "one", kernel="vector"),
    PolicyRule(lambda c, _: c.generation == "pascal", one_group, "one", kernel="unknown"),
    _padded_decode(128, 12, 16),
    _padded_decode(128, 6, 8),
    _padded_decode(128, 10, 16),
    _padded_decode(128, 16, 16),
    _padded_decode(256, 6, 8),
    PolicyRule(_few_mla(lambda c: c.ratio == 20 and c.since("ada")), groups_of(16), "one", 2048, columns=16),
    PolicyRule(_few_mla(lambda c: c.ratio == 20), one_group, "one", 2048, columns=32),
    PolicyRule(_few_mla(lambda c: c.ratio % 12 == 0), groups_of(12), "one", 2048, columns=16),
    *_divisible(576, 512, 16, 8, 4),
    *_divisible(512, 512, 16, 8, 4, 2),
    *_divisible(320, 256, 16),
    PolicyRule(_sizes(192, 128, lambda c: True), dividing_groups(16), "one"),
    PolicyRule(_ik_vector, single_heads, "one", kernel="vector"),
    PolicyRule(lambda c, _: c.k_size != c.v_size, one_group, "one", kernel="unknown"),
)


def _grouped(call: RowAsked) -> bool:
    """llama.cpp's `gqa_opt`: heads of one KV head share a tile (n_kv padded and strides aligned, as here)."""
    return call.ratio >= 2 and not call.alibi


def _mainline_vector(call: RowAsked, threshold: int) -> bool:
    size = call.k_size
    if size != call.v_size or size > 256 or size % 64 or size == 192:
        return False
    if not _grouped(call) and call.n_q == 1:
        return True
    if call.quantised:
        return call.n_q <= (2 if call.since("ada") else 1)
    one = call.n_q == 1 and call.sequences == 1 and call.since("ada")
    return one and not (call.ratio > 4 and (size >= 256 or call.n_kv_padded >= threshold))


def _mla_20_few(call: RowAsked) -> bool:
    return call.mla and call.ratio == 20 and call.n_q <= 4


_MAINLINE_SAME_SIZES = (64, 80, 96, 112, 128, 256, 512)
_MAINLINE_PAIRS = ((576, 512), (192, 128), (320, 256))
_MAINLINE_2026_10 = (
    PolicyRule(
        lambda c, _: not c.since("turing") or c.k_size in (40, 72), one_group, "one", kernel="unknown"
    ),
    PolicyRule(
        lambda c, _: c.sizes not in _MAINLINE_PAIRS
        and (c.k_size != c.v_size or c.k_size not in _MAINLINE_SAME_SIZES),
        one_group, "one", kernel="none",
    ),
    PolicyRule(
        lambda c, _: not _grouped(c) and (c.k_size > 256 or c.k_size == 192),
        one_group, "one", kernel="none",
    ),
    PolicyRule(_mainline_vector, single_heads, "one", 8192, kernel="vector"),
    PolicyRule(
        lambda c, most: _mla_20_few(c) and not c.since("ada") and c.n_kv_padded <= most,
        groups_of(16), "one", 16_384, columns=16,
    ),
    PolicyRule(lambda c, _: _mla_20_few(c) and not c.since("ada"), one_group, "one", columns=32),
    PolicyRule(lambda c, _: _mla_20_few(c) and not c.since("blackwell"), groups_of(16), "one", columns=16),
    PolicyRule(
        lambda c, least: _mla_20_few(c) and c.n_kv_padded >= least,
        groups_of(16), "one", 65_536, columns=16,
    ),
    PolicyRule(_sizes(576, 512, lambda c: c.ratio % 16 == 0), groups_of(16), "one", columns=16),
    PolicyRule(_sizes(576, 512, lambda c: True), groups_of(4), "one", columns=4),
    *_divisible(192, 128, 16, 8),
    *_divisible(320, 256, 32),
    PolicyRule(lambda c, _: not _grouped(c), single_heads, "one"),
    PolicyRule(lambda c, _: c.ratio > 4, groups_of(8), "one", columns=8),
    PolicyRule(lambda c, _: c.ratio > 2, groups_of(4), "one", columns=4),
)  # fmt: skip

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
        Policy(
            "ik-2026-08",
            "ik_llama.cpp of August 2026: one padded launch for r = 6, 10, 12, 16 in decode; vector kernel"
            " (float32) in windowed layers",
            _IK_2026_08,
            dividing_groups(16),
        ),
        Policy("mainline", "groups of 8, a remainder padded to 8, one launch", (), groups_of(8), 8),
        Policy(
            "mainline-2026-10",
            "llama.cpp of October 2026, Turing and later: vector kernel (float32) for one query token, unless"
            " r > 4 and n_kv >= 8192; else groups of 8, 4 or 2 on tensor cores (float16)",
            _MAINLINE_2026_10,
            groups_of(2),
            2,
        ),
    )
}


def policy_named(name: str) -> Policy:
    """Raises SpecError naming the nearest known policy."""
    if name not in POLICIES:
        raise SpecError(
            f"policy={name}: unknown policy{nearest(name, POLICIES)} (known: {', '.join(POLICIES)})"
        )
    return POLICIES[name]
