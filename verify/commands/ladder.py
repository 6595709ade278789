"""`verify ladder`: how far known changes move a model on a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from verify.commands import options
from verify.machine.environment import prepare_torch
from verify.machine.errors import UsageError
from verify.machine.jsontext import to_json_text
from verify.machine.outfile import check_writable


def command(
    model: options.Model = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="text; default: the corpus of ppl")
    ] = None,
    n_ctx: Annotated[int, typer.Option("-c", "--ctx-size", help="tokens a window")] = 512,
    chunks: Annotated[int, typer.Option("--chunks", help="windows to measure, -1 for all")] = 2,
    device: options.Device = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="file for explain, logprobs and kld to place figures on")
    ] = None,
    json_: options.Json = False,
) -> int:
    """Measure and print; exit 0."""
    from verify.explain.climb import ladder_of_text
    from verify.reports.explain import print_ladder
    from verify.reports.progress import progress_of

    if n_ctx < 4 or chunks == 0 or chunks < -1:
        raise UsageError(
            f"-c {n_ctx} --chunks {chunks}: expected at least 4 tokens, and windows from 1, or -1"
        )
    if out is not None:
        check_writable("--out", out, [model, file])
    prepare_torch()
    found = ladder_of_text(model, file, n_ctx, chunks, device, progress_of)
    screen = sys.stderr if json_ else sys.stdout
    print_ladder(found, screen)
    text = to_json_text(found.to_json())
    if out is not None:
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be written: {error.strerror or error}") from None
        print(f"ladder: {out}", file=screen)
    if json_:
        print(text, end="")
    return 0
