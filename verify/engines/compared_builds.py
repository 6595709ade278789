"""Two builds of an engine, or a build and a logits file, on one text: run, then compared."""

from __future__ import annotations

import shlex
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from verify.data.windows import ScoredRows
from verify.engines.builds import Program, ask, find_program, fitted, unknown_options
from verify.engines.compared_files import KldListener, check_options, compare_files
from verify.engines.logits_file import MAGIC, LogitsFile
from verify.engines.perplexity_runs import Batches, EngineRun, engine_command, run_engine
from verify.judge.verdict import EXIT_CODES, Verdict
from verify.machine.errors import UsageError
from verify.machine.jsontext import to_json_text
from verify.machine.outfile import make_folder
from verify.machine.terminal import Progress

MODES = ("decode", "prefill")


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What the command line of `verify engines` says. Raises UsageError where it cannot be done."""

    builds: tuple[str, str]  # A and B: a folder, llama-perplexity, or a logits file
    model: str  # GGUF file
    file: str  # text
    n_ctx: int  # tokens a window
    chunks: int  # windows, -1 for all
    n_q: int | None  # query tokens a call; None: what the mode says
    mode: str  # decode, or prefill
    args: tuple[str, str]  # further options of each build, as a shell writes them
    work: Path  # folder of logits, logs and run.json
    time_limit: float  # seconds that one build may take
    max_kld: float | None  # mean divergence that still is round-off; None: 0

    def __post_init__(self) -> None:
        if self.n_ctx < 4 or self.chunks == 0 or self.chunks < -1:
            raise UsageError(
                f"-c {self.n_ctx} --chunks {self.chunks}: expected at least 4 tokens, and windows from 1,"
                " or -1"
            )
        if not self.time_limit > 0:
            raise UsageError(f"--time-limit {self.time_limit:g}: expected seconds above 0")
        check_options(self.max_kld)
        if self.mode not in MODES:
            raise UsageError(f"--mode {self.mode}: expected decode or prefill")
        if self.n_q is not None and self.n_q < 1:
            raise UsageError(f"--n-q {self.n_q}: expected query tokens from 1")
        for option, path in (("-m", self.model), ("-f", self.file)):
            if not Path(path).is_file():
                raise UsageError(f"{option} {path}: no such file")

    @property
    def batches(self) -> Batches:
        return Batches(self.n_q if self.n_q is not None else 1 if self.mode == "decode" else None)


class EnginesListener(KldListener, Protocol):
    """Who is told how the builds run, and what they leave."""

    def say(self, text: str) -> None:
        """A line about what is run, or has run."""

    def running(self, what: str) -> AbstractContextManager[Progress | None]:
        """A build runs, while the context lasts."""
        ...


class _Side(NamedTuple):
    """One of the two: a build that is run with these options, or a logits file (program None)."""

    name: str
    program: Program | None
    args: list[str]
    logits: Path


def compare_builds(settings: BuildSettings, listener: EnginesListener) -> dict[str, Any]:
    """The content of the `run.json` that it leaves in the folder. Raises UsageError."""
    sides = [
        _side(name, build, _split(args), settings)
        for name, build, args in zip("AB", settings.builds, settings.args, strict=True)
    ]
    # Everything that can be refused is, before the first build runs.
    _check_places(sides, settings.work)
    make_folder("--work", settings.work)
    n_ctx = settings.n_ctx
    scored = ScoredRows.second_half(n_ctx).positions
    listener.say(
        f"{settings.batches}, windows of {n_ctx}: n_kv {scored.start + 1} to {scored.stop} are scored;"
        " whether that reaches a split, verify plan says"
    )
    engines: dict[str, dict[str, Any]] = {}
    lines, troubles = _asked(sides, settings, engines, listener)
    failed = [] if troubles else _run(sides, lines, settings, engines, listener)
    if troubles or failed:
        found = _without_comparison(troubles, failed)
        listener.say(f"verdict: {found['verdict']}: {'; '.join(found['reasons'])}")
    else:
        base, other = (str(side.logits) for side in sides)
        found = compare_files(base, [other], listener, max_kld=settings.max_kld).to_json()
    found = {"schema": 1, "command": "engines", **found, "engines": list(engines.values())}
    (settings.work / "run.json").write_text(to_json_text(found))
    listener.say(f"logits and logs: {settings.work}")
    return found


def _asked(
    sides: list[_Side], settings: BuildSettings, engines: dict[str, dict[str, Any]], listener: EnginesListener
) -> tuple[dict[str, list[str]], list[str]]:
    """The command line of each build, and what keeps one from being run; into `engines` what they say of
    themselves."""
    lines, troubles = {}, []
    for side in sides:
        if side.program is None:
            continue
        said = ask(side.program)
        engines[side.name] = {"name": side.name, "version": said.version}
        listener.say(f"{side.name}: {said.version or 'says no version'} ({side.program.path})")
        if said.trouble:
            troubles.append(f"{side.name} {said.trouble}")
            continue
        own = fitted(side.args, said)
        for option in unknown_options(own, said):
            listener.say(f"{side.name}: its --help does not name {option}")
        lines[side.name] = engine_command(
            side.program,
            model=settings.model,
            text=settings.file,
            n_ctx=settings.n_ctx,
            chunks=settings.chunks,
            logits=side.logits,
            batches=settings.batches,
            more=own,
        )
    return lines, troubles


def _run(
    sides: list[_Side],
    lines: dict[str, list[str]],
    settings: BuildSettings,
    engines: dict[str, dict[str, Any]],
    listener: EnginesListener,
) -> list[EngineRun]:
    """Run every build; those that failed. Into `engines` goes what each did."""
    failed = []
    for side in sides:
        if side.program is None:
            continue
        line, log = lines[side.name], settings.work / f"{side.name.lower()}.log"
        listener.say(f"{side.name}: {shlex.join(line)}")
        with listener.running(f"{side.name} {side.program.path.name}") as progress:
            run = run_engine(
                side.name,
                line,
                logits=side.logits,
                log=log,
                time_limit=settings.time_limit,
                chunks=settings.chunks,
                progress=progress,
            )
        listener.say(f"{side.name}: {run.failure or 'done'} ({run.seconds:.1f} s, {log})")
        for words in run.last:
            listener.say(f"{side.name} |   {words}")
        engines[side.name] |= {**run._asdict(), "logits": str(run.logits), "log": str(run.log)}
        if run.failure:
            failed.append(run)
    return failed


def _side(name: str, build: str, args: list[str], settings: BuildSettings) -> _Side:
    if _is_logits_file(build):
        _check_fits(f"--{name.lower()} {build}", build, settings)
        return _Side(name, None, args, Path(build))
    return _Side(name, find_program(build), args, settings.work / f"{name.lower()}.kld")


def _check_places(sides: list[_Side], work: Path) -> None:
    """Raises UsageError where a build would write over the logits file that it is compared with."""
    written = {side.logits.resolve() for side in sides if side.program}
    for side in sides:
        if side.program is None and side.logits.resolve() in written:
            raise UsageError(
                f"--{side.name.lower()} {side.logits}: the other build's logits would be written there,"
                f" expected another --work than {work}"
            )


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
    code = EXIT_CODES[verdict]
    return {"verdict": verdict, "exit_code": code, "reasons": reasons, "files": [], "pairs": []}


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


def _check_fits(called: str, path: str, settings: BuildSettings) -> None:
    """Raises UsageError for a logits file that holds other windows than the other build will write."""
    with closing(LogitsFile(path)) as file:
        found = file.layout
    if found.n_ctx != settings.n_ctx or settings.chunks not in (-1, found.n_chunk):
        raise UsageError(
            f"{called}: holds {found.n_chunk} windows of {found.n_ctx} tokens, expected -c {found.n_ctx}"
            f" --chunks {found.n_chunk}, got -c {settings.n_ctx} --chunks {settings.chunks}"
        )


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--args {text.strip()!r}: {str(error).lower()}") from None
