"""`verify judge`: a kernel nobody trusts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from verify.commands import options
from verify.machine.command_line import parse_lengths, typed_again
from verify.machine.environment import describe, prepare_torch
from verify.machine.jsontext import to_json_text
from verify.machine.outfile import check_new_folder
from verify.reports.ci import check_ci_options, hand_over


def command(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            help="FILE.py, FILE.py::NAME, options as of py: after a comma; KernelBench files; a definition or"
            " solution of flashinfer-bench (.json)"
        ),
    ],
    shape: Annotated[
        str | None, typer.Option("--shape", help="heads and size, as of verify diff; default 4/2x64")
    ] = None,
    n_kv: Annotated[str, typer.Option("--n-kv", help="lengths, comma between")] = "33,65,300",
    dtype: Annotated[
        str, typer.Option("--dtype", help="of q, k, v: f16, bf16, f32; default: the file's own")
    ] = "",
    arithmetic: Annotated[
        str | None,
        typer.Option("--arithmetic", help="what it says that it computes in, such as p=f16: then it may"),
    ] = None,
    examples: Annotated[int, typer.Option("--examples", min=1, help="cases of each law")] = 10,
    definition: Annotated[
        str | None,
        typer.Option("--definition", help="flashinfer-bench definition that FILE is a solution of"),
    ] = None,
    junit: options.JUnit = None,
    format_: options.Format = "text",
    device: options.Device = None,
    out: options.Out = None,
    json_: options.Json = False,
) -> int:
    """Run the command. Exit 0 if it is right and no cheat was caught, 1 if not."""
    from verify.distrust.judging import judge
    from verify.distrust.told import cases_of, judged_json, print_judged
    from verify.reports.writing import write_run

    check_ci_options(format_, junit)
    check_new_folder(out)
    prepare_torch()
    judged = judge(
        file,
        dtype=dtype,
        shape=shape,
        n_kv=parse_lengths(n_kv),
        arithmetic=arithmetic,
        device=device,
        examples=examples,
        definition=definition,
        on_step=lambda name: print(f"  {name}", file=sys.stderr, flush=True),
    )
    screen = sys.stderr if json_ else sys.stdout
    print_judged(judged, screen)
    if out is not None:
        write_run(out, judged_json(judged, describe(device or "cpu")), typed_again(context), screen)
    hand_over(
        cases_of(judged), f"verify judge {judged.spec}", format_, junit, file=Path(file.partition("::")[0])
    )
    if json_:
        print(to_json_text(judged_json(judged, describe(device or "cpu"))), end="")
    return judged.exit_code
