"""`verify doctor`: versions, device, which kernels can run here, who else claims our package's name."""

from __future__ import annotations

import sys
from importlib import metadata

from verify.kernels.catalogue import CATALOGUE
from verify.machine.environment import describe
from verify.model.errors import ModelError
from verify.model.locate import locate_model

# The one name that an installation puts at the top; `kernels`, `model` and `data` are inside it.
OUR_PACKAGES = ("verify",)


def command() -> int:
    """Print what was found; exit 0."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines: list[tuple[str, object]] = []
    for key, value in describe(device).items():
        if isinstance(value, dict):
            lines += [(f"{key} {name}", found or "not installed") for name, found in value.items()]
        else:
            lines.append((key, value))
    for name, entry in CATALOGUE.items():
        why = entry.why_not()
        lines.append((f"kernel {name}", "can run" if why is None else f"cannot run: {why}"))
    try:
        lines.append(("default model", locate_model(None)))
    except ModelError as error:
        lines.append(("default model", error))
    for name, owners in foreign_owners().items():
        lines.append(
            (f"package {name}", f"also claimed by {', '.join(owners)}: `import {name}` may find theirs")
        )
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}", file=sys.stdout)
    return 0


def foreign_owners() -> dict[str, list[str]]:
    """Top-level package names of ours that another installed distribution provides too."""
    owners = metadata.packages_distributions()
    found = {}
    for name in OUR_PACKAGES:
        others = sorted({d for d in owners.get(name, []) if d.lower() not in ("fa-verify", "fa_verify")})
        if others:
            found[name] = others
    return found
