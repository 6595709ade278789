"""`verify diff`: the kernel diff report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from verify.commands import options
from verify.diff.stored_strata import STRATA, packed
from verify.judge.chances import load_chances
from verify.judge.verdict import DEFAULT_MARGIN
from verify.kernels.plans.shapes import SHAPES
from verify.machine.command_line import parse_lengths
from verify.machine.environment import prepare_torch
from verify.machine.errors import UsageError
from verify.machine.exits import EXIT_INTERRUPTED
from verify.machine.files import write_whole
from verify.machine.jsontext import to_json_text
from verify.machine.outfile import check_writable
from verify.machine.terminal import say
from verify.ppl.settings import DEFAULT_BASELINE, DEFAULT_CANDIDATE
from verify.reports.ci import cases_of_run, check_ci_options, hand_over

# On a CPU one GPU's share of the heads, so that the default ends within a minute or so.
CPU_SHAPE, CPU_N_KV = "glm-4.5-air@4", "512,1101,2048,8192"
# Of those: in full they would take four fifths of the time.
CPU_BRIEF = "2048,8192"
CUDA_SHAPE, CUDA_N_KV = "glm-4.5-air", "512,8192,32768,131072"


def command(
    shape: Annotated[
        str,
        typer.Option(
            "--shape",
            help=f"names ({', '.join(SHAPES)}) or 96/8x128, comma between; NAME@4 is one GPU of 4;"
            f" default {CUDA_SHAPE} (CPU: {CPU_SHAPE})",
        ),
    ] = "",
    n_kv: Annotated[
        str, typer.Option("--n-kv", help=f"lengths, comma between; default {CUDA_N_KV} (CPU: {CPU_N_KV})")
    ] = "",
    brief: Annotated[
        str,
        typer.Option(
            "--brief",
            help="those of --n-kv at which one-hot probes ask for each key once, of one KV head; default"
            f" {CPU_BRIEF} on a CPU without --n-kv and --inputs, else none",
        ),
    ] = "",
    baseline: options.Baseline = DEFAULT_BASELINE,
    candidate: options.Candidates = None,
    inputs: Annotated[
        str, typer.Option("--inputs", help="families, comma between, or all; default all")
    ] = "",
    strict: options.Strict = False,
    captured_from: Annotated[
        str | None,
        typer.Option("--captured-from", help="run folder of verify ppl --capture"),
    ] = None,
    path: Annotated[
        str, typer.Option("--path", help="decode, several (up to 16 query tokens a call) or prefill")
    ] = "decode",
    seeds: Annotated[int, typer.Option("--seeds", help="draws of every family")] = 1,
    first_seed: Annotated[int, typer.Option("--first-seed", help="the first of them")] = 0,
    rows: Annotated[int, typer.Option("--rows", help="query tokens a cell: samples of its stratum")] = 64,
    most_rows: Annotated[
        int,
        typer.Option(
            "--most-rows",
            help="rows that a kind of input which cannot decide is drawn to, doubled look by look; default 16"
            " times --rows",
        ),
    ] = 0,
    n_q: Annotated[
        int,
        typer.Option(
            "--n-q",
            help="query tokens a call, with --path prefill (default all of a cell) or several (default 4)",
        ),
    ] = 0,
    sequences: Annotated[
        int, typer.Option("--sequences", help="sequences a call, every second one shorter")
    ] = 1,
    dtype: Annotated[str, typer.Option("--dtype", help="type of q, k and v: f16, bf16, f32")] = "f16",
    hidden_nan: Annotated[
        bool,
        typer.Option(
            "--hidden-nan",
            help="also inputs whose hidden keys hold NaN and Inf, or 60,000 in every number, which a"
            " finite mask does not hide: what reaches the result is said (--strict: a fault)",
        ),
    ] = False,
    headroom: Annotated[
        bool, typer.Option("--headroom", help="how near are float16 sums to overflow on these inputs?")
    ] = False,
    margin: options.Margin = DEFAULT_MARGIN,
    allow_same: options.AllowSame = False,
    store: Annotated[
        Path | None, typer.Option("--store", help="write the baseline's figures here, for --against-stored")
    ] = None,
    against_stored: Annotated[
        Path | None,
        typer.Option(
            "--against-stored", help="figures that --store wrote, in the place of running the baseline"
        ),
    ] = None,
    junit: options.JUnit = None,
    format_: options.Format = "text",
    device: options.Device = None,
    out: Annotated[Path | None, typer.Option("--out", help="default runs/diff-TIME")] = None,
    json_: options.Json = False,
) -> int:
    """Run the command; returns the exit code of the verdict."""
    from verify.diff.inputs import DiffSettings, all_inputs, check_settings, count_inputs, families_of
    from verify.diff.run import run_diff
    from verify.diff.stored_baseline import BaselineStore, StoredBaseline
    from verify.kernels.call import PATHS
    from verify.machine.devices import chosen_device, default_device
    from verify.machine.stages import StageClock
    from verify.ppl.runfolder import REPORT, RunFolder
    from verify.reports.diff import print_outcome
    from verify.reports.writing import write_reports

    check_ci_options(format_, junit)
    if store is not None:
        check_writable("--store", store)
    prepare_torch()
    load_chances()
    chosen = chosen_device(device or default_device())
    on_cuda = chosen.type == "cuda"
    found_path = next((p for p in PATHS if p == path), None)
    if found_path is None:
        raise UsageError(f"--path {path}: expected decode, several or prefill")
    if captured_from is not None and (
        shape or n_kv or brief or inputs or n_q or sequences != 1 or dtype != "f16" or hidden_nan
    ):
        raise UsageError(
            f"--captured-from {captured_from}: the inputs are those of the folder, expected no --shape,"
            " --n-kv, --brief, --inputs, --n-q, --sequences, --dtype or --hidden-nan beside it"
        )
    drawn = captured_from is None
    lengths = n_kv or (CUDA_N_KV if on_cuda else CPU_N_KV)
    by_default = drawn and not on_cuda and not n_kv and not inputs
    brief = brief or (CPU_BRIEF if by_default else "")
    settings = DiffSettings(
        shapes=tuple((shape or (CUDA_SHAPE if on_cuda else CPU_SHAPE)).split(",")) if drawn else (),
        n_kvs=tuple(parse_lengths(lengths)) if drawn else (),
        families=families_of(inputs or "all", found_path, hidden=hidden_nan) if drawn else (),
        baseline=baseline,
        candidates=tuple(candidate or [DEFAULT_CANDIDATE]),
        device=str(chosen),
        path=found_path,
        seeds=seeds,
        first_seed=first_seed,
        margin=margin,
        captured_from=captured_from,
        rows=rows,
        most_rows=most_rows,
        dtype=dtype,
        allow_same=allow_same,
        strict=strict,
        sequences=sequences,
        n_q=n_q,
        headroom=headroom,
        brief_n_kvs=tuple(parse_lengths(brief, "--brief")) if brief else (),
    )
    check_settings(settings)
    stored = StoredBaseline(against_stored) if against_stored is not None else None
    if stored is not None:
        stored.check(settings)
    kept = BaselineStore() if store is not None else None
    folder = RunFolder.begin(out, "diff", groups=False)
    screen = sys.stderr if json_ else sys.stdout
    clock = StageClock(chosen)
    inputs_ = _shown(all_inputs(settings, chosen, clock), count_inputs(settings))
    outcome = run_diff(settings, chosen, inputs_, clock, show=_shown_again, store=kept, stored=stored)
    if kept is not None and store is not None:
        write_whole(store, kept.packed(str(chosen)))
    folder.write_json("run.json", outcome.run)
    judged = [(one.spec, pair) for one in outcome.candidates if (pair := one.stored()) is not None]
    folder.write_bytes(STRATA, packed(judged))
    write_reports(folder.path)
    say(outcome.seconds, to=screen)
    print_outcome(outcome, screen)
    print(f"report: {folder.path / 'report.html'}", file=screen, flush=True)
    hand_over(
        cases_of_run(outcome.run),
        "verify diff",
        format_,
        junit,
        summary=(folder.path / REPORT).read_text("utf-8"),
    )
    if json_:
        print(to_json_text(outcome.run), end="")
    if outcome.interrupted:
        return EXIT_INTERRUPTED
    if outcome.stopped:
        raise UsageError(f"{outcome.stopped}; what was measured is in {folder.path}")
    return outcome.exit_code


def _shown_again(each: Iterator[Any], said: str) -> Iterator[Any]:
    """The same of another look, and what it is for."""
    print(said, file=sys.stderr, flush=True)
    return _shown(each, None)


def _shown(each: Iterator[Any], total: int | None) -> Iterator[Any]:
    """The same, with a progress bar on a terminal, and a line a shape and length elsewhere."""
    from verify.reports.progress import progress_bar

    bar = progress_bar()
    if not bar.disable:
        with bar:
            yield from bar.track(each, description="cells", total=total)
        return
    last = None
    for one in each:
        if (one.shape, one.n_kv) != last:
            last = one.shape, one.n_kv
            print(f"  {one.shape} at {one.n_kv} keys", file=sys.stderr, flush=True)
        yield one
