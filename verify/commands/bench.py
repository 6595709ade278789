"""`verify bench`: decode time and share of memory bandwidth against n_kv, and where a split starts to pay."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from verify.commands import options

DEFAULT_SPECS = ("flash:kv=auto", "flash:heads=split,kv=auto", "flash:heads=split,kv=auto,launch=each")
CPU_N_KV, CUDA_N_KV = "512,2048", "8192,16384,32768,65536,131072"


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
            help="names (glm-4.5-air, glm-4.5-air@4) or 96/8x128; default glm-4.5-air (CPU: smollm2)",
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
    import torch

    from verify.bench import crossovers, measure, to_json
    from verify.kernels.plans.shapes import shape_named
    from verify.machine.devices import chosen_device, default_device
    from verify.machine.environment import describe, prepare_torch
    from verify.machine.errors import UsageError
    from verify.machine.jsontext import to_json_text
    from verify.reports.bench import crossover_lines, plot, table

    prepare_torch()
    chosen = chosen_device(device or default_device())
    on_cuda = chosen.type == "cuda"
    shapes = [shape_named(s) for s in (shape or ("glm-4.5-air" if on_cuda else "smollm2")).split(",")]
    lengths = options.parse_lengths(n_kv or (CUDA_N_KV if on_cuda else CPU_N_KV))
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    screen = sys.stderr if json_ else sys.stdout
    bandwidth, measurements = measure(shapes, lengths, specs or DEFAULT_SPECS, chosen)
    name = torch.cuda.get_device_name(chosen) if on_cuda else describe("cpu")["cpu"]
    print(f"{name}: reads {bandwidth['read']:.0f} GB/s", file=screen, flush=True)
    found = []
    for m in measurements:
        found.append(m)
        said = m.failed or f"{m.us:.1f} us"
        print(f"  {m.shape} n_kv {m.n_kv} {m.spec}: {said}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "schema": 1,
        "command": "bench",
        "environment": describe(str(chosen)),
        "bandwidth_gb_s": bandwidth,
        "measurements": to_json(found),
        "crossovers": crossovers(found),
    }
    table(found, screen)
    for line in crossover_lines(result["crossovers"]):
        print(line, file=screen)
    for note in sorted({note for m in found for note in m.notes}):
        print(f"note: {note}", file=screen)
    if out is not None:
        (out / "bench.json").write_text(to_json_text(result))
        plot(found, bandwidth["read"], out / "bench.svg")
        print(f"written: {out / 'bench.json'}, {out / 'bench.svg'}", file=screen)
    if json_:
        print(to_json_text(result), end="")
    return 0
