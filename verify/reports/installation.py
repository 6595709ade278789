"""What is installed here: `verify doctor` and `verify list`, as records and as lines."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any, TextIO

from rich.table import Table

from verify.kernels.catalogue import CATALOGUE
from verify.kernels.plans.policy import POLICIES
from verify.machine.environment import describe
from verify.machine.terminal import console_on, say
from verify.model.errors import ModelError
from verify.model.locate import locate_model

# The one name that an installation puts at the top; `kernels`, `model` and `data` are inside it.
OUR_PACKAGES = ("verify",)


def doctor_json(device: str) -> dict[str, Any]:
    """Versions, device, which kernels can run here, who else claims our package's name; as
    docs/json-of-commands.md lists it."""
    model, why_none = None, None
    try:
        model = str(locate_model(None))
    except ModelError as error:
        why_none = str(error)
    whys = {name: entry.why_not() for name, entry in CATALOGUE.items()}
    return {
        "schema": 1,
        "command": "doctor",
        "exit_code": 0,
        "environment": describe(device),
        "kernels": [{"name": name, "runs": why is None, "why_not": why} for name, why in whys.items()],
        "model": model,
        "why_no_model": why_none,
        "claimed_by_others": foreign_owners(),
    }


def print_doctor(found: dict[str, Any], to: TextIO) -> None:
    lines: list[tuple[str, object]] = []
    for key, value in found["environment"].items():
        if isinstance(value, dict):
            lines += [(f"{key} {name}", version or "not installed") for name, version in value.items()]
        else:
            lines.append((key, value))
    for kernel in found["kernels"]:
        can = "can run" if kernel["runs"] else f"cannot run: {kernel['why_not']}"
        lines.append((f"kernel {kernel['name']}", can))
    lines.append(("default model", found["model"] or found["why_no_model"]))
    for name, owners in found["claimed_by_others"].items():
        lines.append(
            (f"package {name}", f"also claimed by {', '.join(owners)}: `import {name}` may find theirs")
        )
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        say(f"{name:<{width}}  {value}", to=to)


def foreign_owners() -> dict[str, list[str]]:
    """Top-level package names of ours that another installed distribution provides too."""
    owners = metadata.packages_distributions()
    found = {}
    for name in OUR_PACKAGES:
        others = sorted({d for d in owners.get(name, []) if d.lower() not in ("fa-verify", "fa_verify")})
        if others:
            found[name] = others
    return found


def kernels_json() -> dict[str, Any]:
    """Every kernel with its options, and the policies; as docs/json-of-commands.md lists it."""
    return {
        "schema": 1,
        "command": "list",
        "exit_code": 0,
        "kernels": [
            {
                "name": entry.name,
                "variants": list(entry.variants),
                "summary": entry.summary,
                "why_not": entry.why_not(),
                "limits": {name: has.limits() for name, has in entry.limits.items()},
                "options": dict(entry.options),
            }
            for entry in CATALOGUE.values()
        ],
        "policies": [{"name": policy.name, "summary": policy.summary} for policy in POLICIES.values()],
    }


def print_kernels(found: dict[str, Any]) -> None:
    console = console_on(sys.stdout)
    for entry in found["kernels"]:
        names = "|".join(entry["variants"])
        named = f"{entry['name']}:{names}" if names else entry["name"]
        here = f"  [here: {entry['why_not']}]" if entry["why_not"] else ""
        console.print(f"{named}  {entry['summary']}{here}")
        for name, limits in entry["limits"].items():
            console.print(f"    {name}: " + "; ".join(limits))
        if entry["options"]:
            table = Table(box=None, show_header=False, pad_edge=False)
            for name, text in entry["options"].items():
                table.add_row(f"    {name}", text)
            console.print(table)
    console.print("policies (policy=NAME)")
    table = Table(box=None, show_header=False, pad_edge=False)
    for policy in found["policies"]:
        table.add_row(f"    {policy['name']}", policy["summary"])
    console.print(table)
