"""`verify ladder`: how far known changes move a model on a text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from verify.commands import options
from verify.data import cut_windows, load_corpus, read_text_file
from verify.machine.environment import prepare_torch
from verify.machine.errors import UsageError
from verify.machine.jsontext import to_json_text
from verify.machine.outfile import check_writable

if TYPE_CHECKING:
    from verify.engines.ladder import Ladder


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
    from verify.reports.explain import print_ladder

    if n_ctx < 4 or chunks == 0 or chunks < -1:
        raise UsageError(
            f"-c {n_ctx} --chunks {chunks}: expected at least 4 tokens, and windows from 1, or -1"
        )
    if out is not None:
        check_writable("--out", out)
    found = measured_ladder(model, file, n_ctx, chunks, device)
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


def measured_ladder(
    model: str | None, file: Path | None, n_ctx: int, chunks: int, device: str | None
) -> Ladder:
    """The ladder of a model on a text (None: the corpus of ppl)."""
    from verify.explain.climb import measure
    from verify.explain.reference import ReferencePasses
    from verify.reports.progress import progress_of

    prepare_torch()
    reference = ReferencePasses(model, device)
    try:
        corpus = read_text_file(str(file)) if file is not None else load_corpus()
        tokenizer = reference.tokenizer
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        windows = cut_windows(tokenizer.encode(corpus.text), n_ctx=n_ctx, chunks=chunks, bos_id=bos)
        with progress_of(f"ladder of {reference.name}") as progress:
            return measure(reference, windows, progress=progress)
    finally:
        reference.close()
