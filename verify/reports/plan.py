"""What `verify plan` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from verify.engines.plans import Setting, plan_at, stretches
from verify.kernels.plans.policy import Policy
from verify.machine.terminal import counted
from verify.reports.tables import print_table


def print_plans(setting: Setting, policies: Sequence[Policy], n_kvs: Sequence[int], to: TextIO) -> None:
    """Where each policy's plans start, then a row a policy and length."""
    print(
        f"{setting.shape}, cache {setting.cache_type}, {counted(setting.gpus, 'GPU')}, split mode"
        f" {setting.split_mode}: {counted(setting.kv_heads_a_gpu, 'KV head')} a GPU; one query token a call,"
        " one layer",
        file=to,
    )
    for policy in policies:
        first, *later = stretches(policy, setting)
        said = [
            first.name,
            *(f"from n_kv {x.padded} ({x.from_n_kv} unpadded) {x.name}" for x in later),
        ]
        print(f"{policy.name}: {'; '.join(said)}", file=to)
    rows = []
    for policy in policies:
        for p in (plan_at(policy, setting, n_kv) for n_kv in n_kvs):
            written = f" + {p.bytes_written / 1e6:.1f} written" if p.bytes_written else ""
            read = f"{p.bytes_read / 1e6:.1f}{written}"
            rows.append([policy.name, p.name, str(p.n_kv), str(p.walks), f"{p.waste:.0%}", read])
    print_table(("policy", "plan", "n_kv", "KV walks", "tile waste", "MB read"), rows, to, words=2)
