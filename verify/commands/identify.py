"""`verify identify SPEC`: an arithmetic read off a kernel."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from verify.commands import options
from verify.machine.command_line import typed_again
from verify.machine.environment import prepare_torch
from verify.machine.jsontext import to_json_text
from verify.machine.outfile import check_new_folder


def command(
    context: typer.Context,
    spec: Annotated[str, typer.Argument(help="kernel specification")],
    shape: Annotated[
        str, typer.Option("--shape", help="a name, or 8/2x64: heads of the calls; default 8/2x64")
    ] = "8/2x64",
    n_kv: Annotated[
        str,
        typer.Option(
            "--n-kv", help="lengths, comma between; default powers of two, 64 to 8192 (CUDA: 131072)"
        ),
    ] = "",
    n_q: Annotated[str, typer.Option("--n-q", help="query tokens a call, comma between")] = "1,4",
    sequences: Annotated[int, typer.Option("--sequences", help="sequences a call")] = 1,
    regimes: Annotated[
        str, typer.Option("--regimes", help="quick: as many as --seconds allow; full: all of them")
    ] = "quick",
    seconds: Annotated[float, typer.Option("--seconds", help="time that quick may take")] = 20.0,
    device: options.Device = None,
    out: options.Out = None,
    json_: options.Json = False,
) -> int:
    """Read, print; exit 0, or 3 where nothing could be read."""
    from verify.identify.run import run_identify
    from verify.machine.devices import chosen_device, default_device
    from verify.reports.identify import identify_json, identify_lines
    from verify.reports.writing import write_run

    check_new_folder(out)
    prepare_torch()
    found = run_identify(
        spec,
        shape=shape,
        n_kv=n_kv,
        n_q=n_q,
        sequences=sequences,
        regimes=regimes,
        seconds=seconds,
        device=chosen_device(device or default_device()),
        tell=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
    )
    screen = sys.stderr if json_ else sys.stdout
    print(*identify_lines(found), sep="\n", file=screen, flush=True)
    write_run(out, identify_json(found), typed_again(context), screen)
    if json_:
        print(to_json_text(identify_json(found)), end="")
    return found.exit_code
