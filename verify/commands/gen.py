"""`verify gen`: greedy text from two kernels, and at the first difference how close it was."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from verify.arms.records import OWN
from verify.commands import options
from verify.data import read_text_file
from verify.judge.chances import load_chances
from verify.judge.verdict import DEFAULT_MARGIN
from verify.kernels.said import visible
from verify.machine.environment import prepare_torch
from verify.machine.errors import UsageError
from verify.machine.exits import EXIT_INTERRUPTED
from verify.machine.jsontext import to_json_text
from verify.machine.records import as_json
from verify.ppl.settings import DEFAULT_BASELINE, DEFAULT_CANDIDATE
from verify.reports.ci import cases_of_run, check_ci_options, hand_over
from verify.reports.split_mode import split_mode_sentence


def command(
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="text to go on with, as it is")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="file that holds the prompt")] = None,
    model: options.Model = None,
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", help="tokens to write")] = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="go on after the model has ended its text")
    ] = False,
    draft: Annotated[
        int,
        typer.Option(
            "--draft",
            help="candidates check drafts in calls of so many tokens, 2 to 16; the baseline writes a token a"
            " call: is the text with drafts the text without?",
        ),
    ] = 0,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help=f"kernel specification, default {DEFAULT_BASELINE}; or {OWN}: the candidate's own kernel,"
            " the default with --draft",
        ),
    ] = None,
    candidate: options.Candidates = None,
    cache_type: options.CacheType = "f16",
    device: options.Device = None,
    min_coverage: options.MinCoverage = 0.0,
    margin: options.Margin = DEFAULT_MARGIN,
    allow_same: options.AllowSame = False,
    split_mode: options.SplitMode = "layer",
    gpus: options.Gpus = 1,
    seed: Annotated[int, typer.Option("--seed", help="of the floor's noise")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of the run; default runs/gen-TIME")
    ] = None,
    junit: options.JUnit = None,
    format_: options.Format = "text",
    json_: options.Json = False,
) -> int:
    """Run the command; returns the exit code of the verdict."""
    from verify.arms.split_mode import tensor_parallel_record
    from verify.gen.evidence import conclude, token_table
    from verify.gen.run import Generation, GenSettings
    from verify.machine.devices import default_device
    from verify.ppl.runfolder import PAGE, RESULT, RunFolder
    from verify.reports.gen import print_outcome
    from verify.reports.writing import write_reports

    check_ci_options(format_, junit)
    prepare_torch()
    load_chances()
    if (prompt is None) == (file is None):
        raise UsageError("-p, -f: expected a prompt, in one of these two ways")
    if file is not None:
        prompt = read_text_file(str(file)).text
    if baseline is None:
        baseline = OWN if draft else DEFAULT_BASELINE
    settings = GenSettings(
        prompt=prompt or "",
        prompt_file=None if file is None else str(file),
        model=model,
        n_predict=n_predict,
        ignore_eos=ignore_eos,
        baseline=baseline,
        candidates=tuple(candidate or [DEFAULT_CANDIDATE]),
        cache_type=cache_type,
        device=device or default_device(),
        min_coverage=min_coverage,
        margin=margin,
        allow_same=allow_same,
        seed=seed,
        split_mode=split_mode,
        gpus=gpus,
        draft=draft,
    )
    screen = sys.stderr if json_ else sys.stdout
    generation = Generation(settings, lambda text: print(f"verify: {text}", file=sys.stderr))
    if shared_out := split_mode_sentence(tensor_parallel_record(generation.architecture, gpus)):
        print(shared_out, file=screen)
    try:
        folder = RunFolder.begin(out, "gen", groups=False)
        spec = settings.candidates[0] if baseline == OWN else baseline
        print(f"baseline {spec} writes: ", end="", file=screen, flush=True)
        text = _Text(generation.tokenizer.decode)
        show = partial(print, end="", file=screen, flush=True)
        found = generation.run(lambda token: show(visible(text.more(token))))
        print(file=screen)
        run = conclude(generation, found)
        folder.write_table("tokens.parquet", token_table(generation, found))
        folder.write_table("layers.parquet", generation.exact.table())
        folder.write_json(RESULT, as_json(run))
        write_reports(folder.path)
    finally:
        generation.close()
    print_outcome(run, folder.path / PAGE, screen)
    hand_over(cases_of_run(as_json(run)), "verify gen", format_, junit)
    if json_:
        print(to_json_text(as_json(run)), end="")
    return EXIT_INTERRUPTED if found.ended == "interrupted" else run.exit_code


class _Text:
    """Text that grows token by token: a character appears once all its bytes are there."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode, self.tokens, self.shown = decode, list[int](), ""

    def more(self, token: int) -> str:
        """What this token adds."""
        self.tokens.append(token)
        whole = self.decode(self.tokens).rstrip("\ufffd")
        new, self.shown = whole[len(self.shown) :], max(whole, self.shown, key=len)
        return new
