"""`verify list`: kernels, their options, policies."""

from __future__ import annotations

import sys

from rich.table import Table

from verify.kernels.catalogue import CATALOGUE
from verify.kernels.plans.policy import POLICIES
from verify.machine.terminal import console_on


def command() -> int:
    """Print every kernel and option; exit 0."""
    console = console_on(sys.stdout)
    for entry in CATALOGUE.values():
        why = entry.why_not()
        names = "|".join(entry.variants)
        named = f"{entry.name}:{names}" if names else entry.name
        console.print(f"{named}  {entry.summary}" + (f"  [here: {why}]" if why else ""))
        for name, has in entry.limits.items():
            console.print(f"    {name}: " + "; ".join(has.limits()))
        if entry.options:
            table = Table(box=None, show_header=False, pad_edge=False)
            for name, text in entry.options.items():
                table.add_row(f"    {name}", text)
            console.print(table)
    console.print("policies (policy=NAME)")
    table = Table(box=None, show_header=False, pad_edge=False)
    for policy in POLICIES.values():
        table.add_row(f"    {policy.name}", policy.summary)
    console.print(table)
    return 0
