"""What `verify plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TextIO

from verify.engines.plans import (
    VERSIONS,
    Change,
    Setting,
    changes,
    kernel_words,
    plan_at,
    stretches,
)
from verify.kernels.plans.policy import POLICIES, Policy
from verify.machine.terminal import counted
from verify.reports.tables import print_table


def print_versions(setting: Setting, to: TextIO) -> None:
    """A line a pair of neighbouring versions: whether this model is affected, from which length, by what.

    Below, where a version's own precision jumps with the length.
    """
    kinds = setting.layer_kinds
    for names in VERSIONS:
        for a, b in pairwise(names):
            found = {kind: changes(POLICIES[a], POLICIES[b], one) for kind, one in kinds.items()}
            if not any(found.values()):
                print(f"{a} -> {b}: your model is not affected", file=to)
                continue
            said = [
                f"{f'{kind}: ' if kind else ''}{_change_text(c)}" for kind, cs in found.items() for c in cs
            ]
            unlike = [kind for kind, cs in found.items() if not cs]
            rest = f"; {unlike[0]} are not" if unlike else ""
            print(f"{a} -> {b}: your model is affected {'; '.join(said)}{rest}", file=to)
    for newest in (names[-1] for names in VERSIONS):
        for kind, one in kinds.items():
            for x, y in pairwise(stretches(POLICIES[newest], one)):
                if x.kernel != y.kernel:
                    print(
                        f"{newest}{f', {kind}' if kind else ''}: precision jumps at n_kv {y.padded}"
                        f" ({y.from_n_kv} unpadded): {kernel_words(x.kernel)}, then {kernel_words(y.kernel)}",
                        file=to,
                    )


def _change_text(c: Change) -> str:
    where = f"from n_kv {c.padded} ({c.from_n_kv} unpadded)" if c.from_n_kv > 1 else "at every length"
    if c.before.kernel == c.after.kernel:
        return f"{where}: {c.before.name} becomes {c.after.name}"
    return (
        f"{where}: {c.before.name} ({kernel_words(c.before.kernel)}) becomes {c.after.name}"
        f" ({kernel_words(c.after.kernel)})"
    )


def print_setting(setting: Setting, to: TextIO) -> None:
    """What the plans below are for."""
    tokens = counted(setting.n_q, "query token")
    print(
        f"{setting.shape}, cache {setting.cache_type}, {counted(setting.gpus, 'GPU')} ({setting.generation}),"
        f" split mode {setting.split_mode}: {counted(setting.kv_heads_a_gpu, 'KV head')} a GPU; {tokens} a"
        " call, one layer",
        file=to,
    )
    if (windowed := setting.windowed) is not None:
        print(f"windowed layers: {windowed}, the last {windowed.sliding_window} keys", file=to)


def print_plans(setting: Setting, policies: Sequence[Policy], n_kvs: Sequence[int], to: TextIO) -> None:
    """Where each policy's plans start, then a row a policy and length."""
    for policy in policies:
        first, *later = stretches(policy, setting)
        said = [
            f"{first.name} ({kernel_words(first.kernel)})",
            *(
                f"from n_kv {x.padded} ({x.from_n_kv} unpadded) {x.name} ({kernel_words(x.kernel)})"
                for x in later
            ),
        ]
        print(f"{policy.name}: {'; '.join(said)}", file=to)
    rows = []
    for policy in policies:
        for p in (plan_at(policy, setting, n_kv) for n_kv in n_kvs):
            written = f" + {p.bytes_written / 1e6:.1f} written" if p.bytes_written else ""
            read = f"{p.bytes_read / 1e6:.1f}{written}"
            rows.append([policy.name, p.name, str(p.n_kv), p.kernel, str(p.walks), f"{p.waste:.0%}", read])
    if rows:
        columns = ("policy", "plan", "n_kv", "kernel", "KV walks", "tile waste", "MB read")
        print_table(columns, rows, to, words=2)
