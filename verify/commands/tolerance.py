"""`verify tolerance`: how large the error of a right kernel may be."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from verify.commands import options
from verify.machine.environment import prepare_torch
from verify.machine.jsontext import to_json_text


def command(
    spec: Annotated[
        str, typer.Argument(help="a kernel that is taken to be right: eager:p=f16,acc=f32,out=f16, py:...")
    ] = "eager",
    shape: Annotated[str, typer.Option("--shape", help="a name, or 8/2x64")] = "8/2x64",
    n_kv: Annotated[int, typer.Option("--n-kv", help="keys of every row")] = 512,
    inputs: Annotated[
        str, typer.Option("--inputs", help="families, comma between")
    ] = "gaussian,needles,peaked,rising",
    seeds: Annotated[int, typer.Option("--seeds", help="calls of 16 draws each")] = 4,
    device: options.Device = None,
    json_: options.Json = False,
) -> int:
    """Print; exit 0."""
    from verify.reports.tolerance import print_tolerances
    from verify.tolerances import tolerance

    prepare_torch()
    found = tolerance(spec, shape, n_kv=n_kv, families=inputs.split(","), seeds=seeds, device=device)
    print_tolerances(found, sys.stderr if json_ else sys.stdout)
    if json_:
        print(to_json_text(found.to_json()), end="")
    return 0
