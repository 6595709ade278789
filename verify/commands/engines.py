"""`verify engines`: two builds of an engine on the text-generation path, compared."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from verify.commands import options
from verify.engines.compared_builds import BuildSettings, compare_builds
from verify.machine.jsontext import to_json_text
from verify.reports.engines import EnginesScreen


def command(
    a: Annotated[
        str,
        typer.Option("--a", help="build: its folder or llama-perplexity; or a logits file of it"),
    ],
    b: Annotated[str, typer.Option("--b", help="the other build")],
    model: Annotated[str, typer.Option("-m", "--model", help="GGUF file")],
    file: Annotated[str, typer.Option("-f", "--file", help="text")],
    n_ctx: Annotated[int, typer.Option("-c", "--ctx-size", help="tokens a window")] = 512,
    chunks: Annotated[int, typer.Option("--chunks", help="windows to measure, -1 for all")] = 4,
    n_q: Annotated[
        int | None, typer.Option("--n-q", "-ub", help="query tokens a call; default 1 (decode)")
    ] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="decode, or prefill: the engine's own batches, or --n-q at once")
    ] = "decode",
    args: Annotated[str, typer.Option("--args", help="further options of both, '-ngl 99 -fa on' say")] = "",
    args_a: Annotated[str, typer.Option("--args-a", help="further options of the first alone")] = "",
    args_b: Annotated[str, typer.Option("--args-b", help="further options of the second alone")] = "",
    work: Annotated[
        Path | None, typer.Option("--work", help="folder of logits and logs; default runs/engines-TIME")
    ] = None,
    time_limit: Annotated[
        float, typer.Option("--time-limit", help="seconds that one build may take")
    ] = 3600.0,
    max_kld: Annotated[
        float | None, typer.Option("--max-kld", help="mean KLD that still is round-off; more is degraded")
    ] = None,
    json_: options.Json = False,
) -> int:
    """Run both and compare; returns the verdict's exit code."""
    settings = BuildSettings(
        builds=(a, b),
        model=model,
        file=file,
        n_ctx=n_ctx,
        chunks=chunks,
        n_q=n_q,
        mode=mode,
        args=(f"{args} {args_a}", f"{args} {args_b}"),
        work=work or Path("runs") / f"engines-{datetime.now():%Y%m%d-%H%M%S}",
        time_limit=time_limit,
        max_kld=max_kld,
    )
    found = compare_builds(settings, EnginesScreen(sys.stderr if json_ else sys.stdout))
    if json_:
        print(to_json_text(found), end="")
    return int(found["exit_code"])
