"""`verify engines`: two builds of an engine on the text-generation path, compared."""

from __future__ import annotations

import shlex
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from verify.commands import options
from verify.commands.kld import compare_files
from verify.engines.builds import ask, find_program, fitted, unknown_options
from verify.engines.logits_file import MAGIC, LogitsFile
from verify.engines.perplexity_runs import Batches, engine_command, run_engine
from verify.judge.verdict import EXIT_CODES, Verdict
from verify.machine.errors import UsageError
from verify.machine.jsontext import to_json_text
from verify.reports.tables import progress_of

if TYPE_CHECKING:
    from verify.engines.builds import Program
    from verify.engines.perplexity_runs import EngineRun


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

    if n_ctx < 4 or chunks == 0 or chunks < -1:
        raise UsageError(
            f"-c {n_ctx} --chunks {chunks}: expected at least 4 tokens, and windows from 1, or -1"
        )
    if not time_limit > 0:
        raise UsageError(f"--time-limit {time_limit:g}: expected seconds above 0")
    if max_kld is not None and not max_kld >= 0:
        raise UsageError(f"--max-kld {max_kld:g}: expected a number from 0")
    if mode not in ("decode", "prefill"):
        raise UsageError(f"--mode {mode}: expected decode or prefill")
    if n_q is not None and n_q < 1:
        raise UsageError(f"--n-q {n_q}: expected query tokens from 1")
    for option, path in (("-m", model), ("-f", file)):
        if not Path(path).is_file():
            raise UsageError(f"{option} {path}: no such file")
    folder = work or Path("runs") / f"engines-{datetime.now():%Y%m%d-%H%M%S}"
    sides = [
        _side(name, build, _split(f"{args} {own}"), folder, n_ctx, chunks)
        for name, build, own in (("A", a, args_a), ("B", b, args_b))
    ]
    # Everything that can be refused is, before the first build runs.
    written = {side.logits.resolve() for side in sides if side.program}
    for side in sides:
        if side.program is None and side.logits.resolve() in written:
            raise UsageError(
                f"--{side.name.lower()} {side.logits}: the other build's logits would be written there,"
                f" expected another --work than {folder}"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--work {folder}: cannot be written: {error.strerror or error}") from None
    screen = sys.stderr if json_ else sys.stdout
    batches = Batches(n_q if n_q is not None else 1 if mode == "decode" else None)
    print(
        f"{batches}, windows of {n_ctx}: n_kv {n_ctx // 2 + 1} to {n_ctx - 1} are scored; whether that"
        " reaches a split, verify plan says",
        file=screen,
    )
    engines: dict[str, dict[str, Any]] = {}
    troubles, lines = [], {}
    for side in sides:
        if side.program is None:
            continue
        said = ask(side.program)
        engines[side.name] = {"name": side.name, "version": said.version}
        print(f"{side.name}: {said.version or 'says no version'} ({side.program.path})", file=screen)
        if said.trouble:
            troubles.append(f"{side.name} {said.trouble}")
            continue
        own = fitted(side.args, said)
        for option in unknown_options(own, said):
            print(f"{side.name}: its --help does not name {option}", file=screen)
        lines[side.name] = engine_command(
            side.program,
            model=model,
            text=file,
            n_ctx=n_ctx,
            chunks=chunks,
            logits=side.logits,
            batches=batches,
            more=own,
        )
    failed = []
    for side in sides if not troubles else ():
        if side.program is None:
            continue
        line, log = lines[side.name], folder / f"{side.name.lower()}.log"
        print(f"{side.name}: {shlex.join(line)}", file=screen, flush=True)
        with progress_of(f"{side.name} {side.program.path.name}") as progress:
            run = run_engine(
                side.name,
                line,
                logits=side.logits,
                log=log,
                time_limit=time_limit,
                chunks=chunks,
                progress=progress,
            )
        print(f"{side.name}: {run.failure or 'done'} ({run.seconds:.1f} s, {log})", file=screen, flush=True)
        for words in run.last:
            print(f"{side.name} |   {words}", file=screen)
        engines[side.name] |= {**run._asdict(), "logits": str(run.logits), "log": str(run.log)}
        if run.failure:
            failed.append(run)
    if troubles or failed:
        found = _without_comparison(troubles, failed)
        print(f"verdict: {found['verdict']}: {'; '.join(found['reasons'])}", file=screen)
    else:
        paths = [str(side.logits) for side in sides]
        found = compare_files(paths[0], [paths[1]], max_kld=max_kld, screen=screen)
    found["command"] = "engines"
    found["engines"] = list(engines.values())
    (folder / "run.json").write_text(to_json_text(found))
    print(f"logits and logs: {folder}", file=screen, flush=True)
    if json_:
        print(to_json_text(found), end="")
    return int(found["exit_code"])


class _Side(NamedTuple):
    """One of the two: a build that is run with these options, or a logits file (program None)."""

    name: str
    program: Program | None
    args: list[str]
    logits: Path


def _side(name: str, build: str, args: list[str], folder: Path, n_ctx: int, chunks: int) -> _Side:

    if _is_logits_file(build):
        _check_fits(f"--{name.lower()} {build}", build, n_ctx, chunks)
        return _Side(name, None, args, Path(build))
    return _Side(name, find_program(build), args, folder / f"{name.lower()}.kld")


def _without_comparison(troubles: list[str], failed: list[EngineRun]) -> dict[str, Any]:
    """What is said where a build left no logits: `broken` where B failed within its windows, and it alone."""
    broken = not troubles and all(run.name == "B" and not run.before_windows for run in failed)
    verdict: Verdict = "broken" if broken else "inconclusive"
    reasons = list(troubles)
    for run in failed:
        when = " before its first window" if run.before_windows else ""
        reasons.append(f"{run.name} {run.failure}{when}{f': {run.told}' if run.told else ''}")
    if not broken and not troubles and any(run.name == "A" for run in failed):
        reasons.append("without the first build's logits there is nothing to compare with")
    return {
        "schema": 1,
        "verdict": verdict,
        "reasons": reasons,
        "exit_code": EXIT_CODES[verdict],
        "files": [],
        "pairs": [],
    }


def _is_logits_file(build: str) -> bool:
    """Whether `build` is a logits file rather than a program."""
    path = Path(build)
    if not path.is_file():
        return False
    try:
        with path.open("rb") as f:
            if f.read(len(MAGIC)) != MAGIC:
                return False
    except OSError:
        return False
    LogitsFile(path).close()
    return True


def _check_fits(called: str, path: str, n_ctx: int, chunks: int) -> None:
    """Raises UsageError for a logits file that holds other windows than the other build will write."""
    with closing(LogitsFile(path)) as file:
        found = file.layout
    if found.n_ctx != n_ctx or chunks not in (-1, found.n_chunk):
        raise UsageError(
            f"{called}: holds {found.n_chunk} windows of {found.n_ctx} tokens, expected -c {found.n_ctx}"
            f" --chunks {found.n_chunk}, got -c {n_ctx} --chunks {chunks}"
        )


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--args {text.strip()!r}: {str(error).lower()}") from None
