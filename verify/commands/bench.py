"""`verify bench`: decode time and share of memory bandwidth against n_kv, and where a split starts to pay."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from verify.commands import options
from verify.kernels.plans.shapes import shape_named
from verify.machine.command_line import parse_lengths
from verify.machine.environment import prepare_torch
from verify.machine.jsontext import to_json_text
from verify.machine.outfile import make_folder

DEFAULT_SPECS = ("flash:kv=auto", "flash:heads=split,kv=auto", "flash:heads=split,kv=auto,launch=each")
CPU_N_KV, CUDA_N_KV = "512,2048", "8192,16384,32768,65536,131072"
CPU_SHAPE, CUDA_SHAPE = "smollm2", "glm-4.5-air"


def command(
    specs: Annotated[
        list[str] | None,
        typer.Argument(
            help="kernel specifications; the first is what the others are compared with; default"
            f" {' '.join(DEFAULT_SPECS)}"
        ),
    ] = None,
    shape: Annotated[
        str,
        typer.Option(
            "--shape",
            help=f"names (glm-4.5-air, glm-4.5-air@4) or 96/8x128; default {CUDA_SHAPE} (CPU: {CPU_SHAPE})",
        ),
    ] = "",
    n_kv: Annotated[
        str, typer.Option("--n-kv", help=f"lengths, comma between; default {CUDA_N_KV} (CPU: {CPU_N_KV})")
    ] = "",
    device: options.Device = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder for bench.json and bench.svg")] = None,
    json_: options.Json = False,
) -> int:
    """Measure and print; exit 0."""
    from verify.bench import measure_all
    from verify.machine.devices import chosen_device, default_device
    from verify.reports.bench import BenchScreen, write_result

    prepare_torch()
    chosen = chosen_device(device or default_device())
    cuda = chosen.type == "cuda"
    shapes = [shape_named(s) for s in (shape or (CUDA_SHAPE if cuda else CPU_SHAPE)).split(",")]
    lengths = parse_lengths(n_kv or (CUDA_N_KV if cuda else CPU_N_KV))
    if out is not None:
        make_folder("--out", out)
    screen = BenchScreen(sys.stderr if json_ else sys.stdout)
    result = measure_all(shapes, lengths, specs or DEFAULT_SPECS, chosen, screen)
    screen.outcome(result)
    if out is not None:
        screen.written(write_result(result, out))
    if json_:
        print(to_json_text(result.to_json()), end="")
    return 0
