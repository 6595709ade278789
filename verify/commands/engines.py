"""`verify engines`: two builds of an engine on the text-generation path, compared."""

from __future__ import annotations

import shlex
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from verify.commands import options


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
    from verify.engines.perplexity_runs import engine_command, find_program, run_engine
    from verify.judge.verdict import EXIT_CODES, Verdict
    from verify.machine.errors import UsageError
    from verify.machine.jsontext import to_json_text
    from verify.reports.tables import progress_of

    if n_ctx < 4 or chunks == 0 or chunks < -1:
        raise UsageError(
            f"-c {n_ctx} --chunks {chunks}: expected at least 4 tokens, and windows from 1, or -1"
        )
    if not time_limit > 0:
        raise UsageError(f"--time-limit {time_limit:g}: expected seconds above 0")
    if max_kld is not None and not max_kld >= 0:
        raise UsageError(f"--max-kld {max_kld:g}: expected a number from 0")
    for option, path in (("-m", model), ("-f", file)):
        if not Path(path).is_file():
            raise UsageError(f"{option} {path}: no such file")
    builds = [("A", a, args_a), ("B", b, args_b)]
    # Everything that can be refused is, before the first build runs.
    programs = [None if _is_logits_file(build) else find_program(build) for _, build, _ in builds]
    for (name, build, _), program in zip(builds, programs, strict=True):
        if program is None:
            _check_fits(f"--{name.lower()} {build}", build, n_ctx, chunks)
    more = [_split(f"{args} {own}") for _, _, own in builds]
    folder = work or Path("runs") / f"engines-{datetime.now():%Y%m%d-%H%M%S}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--work {folder}: cannot be written: {error.strerror or error}") from None
    # Where each build's logits lie, or will.
    paths = [
        str(folder / f"{name.lower()}.kld") if program else build
        for (name, build, _), program in zip(builds, programs, strict=True)
    ]
    written = {Path(path).resolve() for path, program in zip(paths, programs, strict=True) if program}
    for (name, build, _), program in zip(builds, programs, strict=True):
        if program is None and Path(build).resolve() in written:
            raise UsageError(
                f"--{name.lower()} {build}: the other build's logits would be written there,"
                f" expected another --work than {folder}"
            )
    screen = sys.stderr if json_ else sys.stdout
    print(
        f"one query token a call (-b 1 -ub 1), windows of {n_ctx}: n_kv {n_ctx // 2 + 1} to {n_ctx - 1} are"
        " scored; whether that reaches a split, verify plan says",
        file=screen,
    )
    runs = []
    for (name, *_), program, own, path in zip(builds, programs, more, paths, strict=True):
        if program is None:
            continue
        logits, log = Path(path), folder / f"{name.lower()}.log"
        line = engine_command(
            program, model=model, text=file, n_ctx=n_ctx, chunks=chunks, logits=logits, more=own
        )
        print(f"{name}: {shlex.join(line)}", file=screen, flush=True)
        with progress_of(f"{name} {program.name}") as progress:
            run = run_engine(
                name, line, logits=logits, log=log, time_limit=time_limit, chunks=chunks, progress=progress
            )
        print(f"{name}: {run.failure or 'done'} ({run.seconds:.1f} s, {log})", file=screen, flush=True)
        for said in run.last:
            print(f"{name} |   {said}", file=screen)
        runs.append(run)
    failed = [run for run in runs if run.failure]
    if failed:
        verdict: Verdict = "broken" if all(run.name == "B" for run in failed) else "inconclusive"
        reasons = [f"{run.name} {run.failure}" for run in failed]
        if verdict == "inconclusive":
            reasons.append("without the first build's logits there is nothing to compare with")
        print(f"verdict: {verdict}: {'; '.join(reasons)}", file=screen)
        found: dict[str, Any] = {
            "schema": 1,
            "verdict": verdict,
            "reasons": reasons,
            "files": [],
            "pairs": [],
        }
        found["exit_code"] = EXIT_CODES[verdict]
    else:
        from verify.commands.kld import compare_files

        found = compare_files(paths[0], [paths[1]], max_kld=max_kld, screen=screen)
    found["command"] = "engines"
    found["engines"] = [
        {**run._asdict(), "logits": str(run.logits), "log": str(run.log)} for run in runs
    ]  # fmt: skip
    (folder / "run.json").write_text(to_json_text(found))
    print(f"logits and logs: {folder}", file=screen, flush=True)
    if json_:
        print(to_json_text(found), end="")
    return int(found["exit_code"])


def _is_logits_file(build: str) -> bool:
    """Whether `build` is a logits file rather than a program."""
    from verify.engines.logits_file import MAGIC, LogitsFile

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
    from contextlib import closing

    from verify.engines.logits_file import LogitsFile
    from verify.machine.errors import UsageError

    with closing(LogitsFile(path)) as file:
        found = file.layout
    if found.n_ctx != n_ctx or chunks not in (-1, found.n_chunk):
        raise UsageError(
            f"{called}: holds {found.n_chunk} windows of {found.n_ctx} tokens, expected -c {found.n_ctx}"
            f" --chunks {found.n_chunk}, got -c {n_ctx} --chunks {chunks}"
        )


def _split(text: str) -> list[str]:
    from verify.machine.errors import UsageError

    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--args {text.strip()!r}: {str(error).lower()}") from None
