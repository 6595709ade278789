"""`verify ppl`: perplexity with both kernels, paired, and a verdict."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import typer

from verify.commands import options
from verify.data.corpora import DEFAULT_CORPUS
from verify.judge.verdict import DEFAULT_MARGIN
from verify.machine.exits import EXIT_INTERRUPTED
from verify.ppl.settings import (
    DEFAULT_BASELINE,
    DEFAULT_CANDIDATE,
    DEFAULT_CHECKPOINT_MINUTES,
    PplSettings,
    parse_size,
)

# What --resume may stand beside: all else is the run's.
_WITH_RESUME = {"resume", "memory", "checkpoint_minutes", "json_"}
# What a run's folder cannot ask for by itself is named again.
_NAMED_AGAIN = {"baseline", "candidate", "save_logits"}


def command(
    context: typer.Context,
    model: options.Model = None,
    file: Annotated[str | None, typer.Option("-f", "--file", help="text file, byte-exact")] = None,
    corpus: Annotated[
        str, typer.Option("--corpus", help="wikitext-2, wikitext-103 or ORG/NAME[:CONFIG[:SPLIT[:COLUMN]]]")
    ] = DEFAULT_CORPUS,
    n_ctx: Annotated[int, typer.Option("-c", "--ctx-size", help="tokens a window")] = 512,
    chunks: Annotated[int, typer.Option("--chunks", help="windows to measure, -1 for all")] = 4,
    path: Annotated[
        str, typer.Option("--path", help="decode (one query token a row), prefill or both")
    ] = "decode",
    baseline: options.Baseline = DEFAULT_BASELINE,
    candidate: options.Candidates = None,
    cache_type: options.CacheType = "f16",
    cache_type_k: Annotated[
        str | None, typer.Option("-ctk", help="of K; default --cache-type; must equal -ctv")
    ] = None,
    cache_type_v: Annotated[
        str | None, typer.Option("-ctv", help="of V; default --cache-type; must equal -ctk")
    ] = None,
    device: options.Device = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="for hidden states of a group, 8G say")
    ] = None,
    min_coverage: options.MinCoverage = 0.0,
    margin: options.Margin = DEFAULT_MARGIN,
    allow_same: options.AllowSame = False,
    capture: Annotated[
        str | None,
        typer.Option("--capture", help="write q, k, v of these layers: all, or 0,5"),
    ] = None,
    save_logits: Annotated[
        str | None,
        typer.Option("--save-logits", help="write exact's logits, a --kl-divergence-base file"),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="an engine's logits file as one more arm; may be repeated"),
    ] = None,
    score_last: Annotated[
        int | None,
        typer.Option(
            "--score-last", help="score the last N positions only; what is before them is computed once"
        ),
    ] = None,
    measured_windows: Annotated[
        int | None,
        typer.Option(
            "--measured-windows",
            help="windows on which kernels are measured against exact, spread over the text; 0 for all;"
            " default: 32768 tokens of them, at least 16",
        ),
    ] = None,
    noise: Annotated[
        int, typer.Option("--noise", help="arms with the baseline's kernel and random plans, 8 say")
    ] = 0,
    power: Annotated[
        bool, typer.Option("--power", help="plant faults of graded size: which of them does this run see?")
    ] = False,
    compute: Annotated[
        str, typer.Option("--compute", help="type of everything but attention: f32, f64 (small models)")
    ] = "f32",
    split_mode: options.SplitMode = "layer",
    gpus: options.Gpus = 1,
    checkpoint_minutes: Annotated[
        float,
        typer.Option(
            "--checkpoint-minutes", help="how often a group is kept between layers, for --resume; 0: always"
        ),
    ] = DEFAULT_CHECKPOINT_MINUTES,
    seed: Annotated[
        int, typer.Option("--seed", help="of sampled rows, floor noise and noise arms' plans")
    ] = 0,
    resume: Annotated[Path | None, typer.Option("--resume", help="go on with the run in this folder")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="folder of the run; default runs/ppl-TIME")
    ] = None,
    json_: options.Json = False,
) -> int:
    """Run the command; returns the exit code of the verdict."""
    from verify.arms.records import SCHEMA
    from verify.kernels.errors import MachineFailure
    from verify.kernels.said import visible
    from verify.machine.devices import default_device
    from verify.machine.environment import prepare_torch
    from verify.machine.errors import UsageError
    from verify.machine.jsontext import to_json_text
    from verify.machine.outfile import check_writable
    from verify.machine.ranks import ranks_of_environment
    from verify.machine.records import as_json
    from verify.model.gguf.held import ModelChanged
    from verify.ppl.experiment import Experiment
    from verify.ppl.resuming import Named, check_named_again, words_to_resume
    from verify.ppl.runfolder import RunFolder
    from verify.reports.ppl_screen import PplConsole

    prepare_torch()
    ranks = ranks_of_environment()
    console = PplConsole(json=json_, silent=not ranks.leads)
    folder, stored = None, {}
    if resume is not None:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
        if set(given) - _WITH_RESUME - _NAMED_AGAIN:
            other = sorted(set(given) - _WITH_RESUME)
            called = {p.name: max(p.opts, key=len) for p in context.command.params}
            raise UsageError(
                f"--resume {resume}: the run goes on with its own settings, expected no"
                f" {' or '.join(called[name] for name in other)} beside it"
            )
        if ranks.leads:
            folder = RunFolder.reopen(resume)
            stored = folder.read_settings("ppl")
            folder = folder.absolute()
        stored = ranks.of_leader(stored)
        try:
            settings = PplSettings.from_json(stored["settings"])
        except UsageError as error:
            raise UsageError(f"--resume {resume}: settings.json: {error}") from None
        check_named_again(
            settings,
            Named(baseline if "baseline" in given else None, candidate or (), save_logits),
            resume=resume,
            begun_in=_begun_in(stored, resume),
            kernels=stored["identity"].get("kernels"),
        )
        _go_to(_begun_in(stored, resume), resume)
        if memory:
            settings = replace(settings, memory=parse_size(memory))
        if "checkpoint_minutes" in given:
            settings = replace(settings, checkpoint_minutes=checkpoint_minutes)
    else:
        settings = PplSettings(
            model=model,
            file=file,
            corpus=corpus,
            n_ctx=n_ctx,
            chunks=chunks,
            path=path,
            baseline=baseline,
            candidates=tuple(candidate or [DEFAULT_CANDIDATE]),
            cache_type=_one_cache_type(cache_type, cache_type_k, cache_type_v),
            device=device or default_device(),
            memory=parse_size(memory) if memory else None,
            min_coverage=min_coverage,
            margin=margin,
            allow_same=allow_same,
            seed=seed,
            capture=capture,
            compute=compute,
            save_logits=save_logits,
            against=tuple(against or ()),
            noise=noise,
            score_last=score_last,
            measured_windows=measured_windows,
            power=power,
            checkpoint_minutes=checkpoint_minutes,
            split_mode=split_mode,
            gpus=gpus,
        )
    if settings.save_logits is not None:
        check_writable("--save-logits", settings.save_logits)
    experiment = Experiment(settings, console, ranks)
    outcome = None
    try:
        if resume is None and ranks.leads:
            folder = RunFolder.begin(out, "ppl")
        identity = experiment.identity()
        ranks.agree(identity)
        for what, value in identity.items() if stored else ():
            if stored["identity"].get(what) != value:
                raise UsageError(f"--resume {resume}: {what} changed since the run began")
        if folder is not None and not stored:
            folder.write_settings(
                {
                    "schema": SCHEMA,
                    "command": "ppl",
                    "settings": experiment.settings.to_json(),
                    "identity": identity,
                    "folder": str(Path.cwd()),
                }
            )
        if folder is not None:
            # What draws the report takes a second to load: it is there when the last group is.
            Thread(target=import_module, args=("verify.reports.writing",), daemon=True).start()
        outcome = experiment.run(folder)
    except KeyboardInterrupt:
        console.stop()
        if folder is None:
            return EXIT_INTERRUPTED
        print(
            f"verify: interrupted; finished windows are kept in {visible(str(folder.path))},"
            f" go on with: {visible(words_to_resume(folder.path, settings))}",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    except ModelChanged as changed:
        if folder is None:
            raise
        raise ModelChanged(
            f"{changed}; finished windows are kept, and go on with the model that they are of:"
            f" {words_to_resume(folder.path, settings)}"
        ) from None
    except MachineFailure as failed:
        if folder is None:
            raise
        raise MachineFailure(
            f"{failed}; finished windows are kept, go on with: {words_to_resume(folder.path, settings)}"
        ) from None
    finally:
        console.stop()
        experiment.close()
        ranks.close()
        if folder is not None and outcome is None:
            folder.release()
    if folder is None or outcome is None:
        return 0
    from verify.reports.writing import write_reports

    run = as_json(outcome.run)
    folder.write_results(outcome.joined, run)
    write_reports(folder.path)
    folder.finish()
    folder.release()
    console.outcome(outcome.run, folder.path)
    if json_:
        print(to_json_text(run), end="")
    return outcome.run.exit_code


def _begun_in(stored: dict[str, Any], resume: Path) -> Path:
    """The folder from which a run's settings name files. Raises UsageError."""
    from verify.machine.errors import UsageError

    folder = stored.get("folder", ".")
    if not isinstance(folder, str) or "\0" in folder:
        raise UsageError(f"--resume {resume}: settings.json: folder: expected a text, got {folder!r:.80}")
    return Path(folder)


def _go_to(folder: Path, resume: Path) -> None:
    """To where the run was begun: names of files in its settings are seen from there."""
    from verify.machine.errors import UsageError

    if folder == Path.cwd():
        return
    try:
        os.chdir(folder)
    except OSError as error:
        raise UsageError(
            f"--resume {resume}: the run was begun in {folder}, where its files are named from:"
            f" {error.strerror}"
        ) from None


def _one_cache_type(both: str, k: str | None, v: str | None) -> str:
    from verify.machine.errors import UsageError

    chosen = {k or both, v or both}
    if len(chosen) > 1:
        raise UsageError(f"-ctk {k or both} -ctv {v or both}: expected the same type for K and V")
    return chosen.pop()
