"""`verify list`: kernels, their options, policies."""

from __future__ import annotations

from verify.commands import options
from verify.machine.jsontext import to_json_text
from verify.reports.installation import kernels_json, print_kernels


def command(json_: options.Json = False) -> int:
    """Print every kernel and option; exit 0."""
    if json_:
        print(to_json_text(kernels_json()), end="")
    else:
        print_kernels(kernels_json())
    return 0
