"""Going on with a run from its folder, which may be a stranger's.

A folder says what was measured; it cannot ask for code to be run, or for a file outside it to be written.
What of its settings does that is done only where the command line names it again, and a kernel's file must
be, byte for byte, the one that the run began with: that is looked at before any of it runs.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from verify.arms.records import OWN
from verify.kernels.errors import SpecError
from verify.kernels.plans.spec import parse_spec
from verify.machine.errors import UsageError
from verify.machine.ranks import Ranks
from verify.ppl.runfolder import RunFolder
from verify.ppl.settings import PplSettings

# Kernels of ours, and of libraries that are installed here: no file of the user's is run for them.
_NO_FILE = {"exact", "eager", "flash", "sdpa", "flex", "flashinfer", "flash_attn", "xformers", OWN}


# What --resume may stand beside: all else is the run's.
_WITH_RESUME = {"resume", "memory", "checkpoint_minutes", "json_", "junit", "format_"}
# What a run's folder cannot ask for by itself is named again.
_NAMED_AGAIN = {"baseline", "candidate", "save_logits"}


class BegunRun(NamedTuple):
    """A run that is gone on with."""

    named: Path  # its folder, as the command line has it
    folder: RunFolder | None  # None in ranks that do not lead
    settings: PplSettings
    identity: dict[str, Any]  # of model, text and kernels, as the run stored it


class Named(NamedTuple):
    """What a command line with --resume names again."""

    baseline: str | None = None
    candidates: Sequence[str] = ()
    save_logits: str | None = None


def check_alone(resume: Path, given: Mapping[str, str]) -> None:
    """Raises UsageError where an option stands beside --resume that the run's own settings answer.

    given: parameters on the command line, and the options that they are written as.
    """
    if given.keys() - _WITH_RESUME - _NAMED_AGAIN:
        other = [given[name] for name in sorted(given.keys() - _WITH_RESUME)]
        raise UsageError(
            f"--resume {resume}: the run goes on with its own settings, expected no"
            f" {' or '.join(other)} beside it"
        )


def go_on(
    resume: Path, named: Named, ranks: Ranks, *, memory: int | None, checkpoint_minutes: float | None
) -> BegunRun:
    """The run of a folder, which only the leader reads. Goes to the folder from which the run was begun.

    memory, checkpoint_minutes: instead of the run's own, where they are given. Raises UsageError.
    """
    folder, stored = None, {}
    if ranks.leads:
        folder = RunFolder.reopen(resume)
        stored = folder.read_settings("ppl")
        folder = folder.absolute()
    stored = ranks.of_leader(stored)
    try:
        settings = PplSettings.from_json(stored["settings"])
    except UsageError as error:
        raise UsageError(f"--resume {resume}: settings.json: {error}") from None
    begun_in = where_begun(stored, resume)
    identity = stored["identity"]
    check_named_again(settings, named, resume=resume, begun_in=begun_in, kernels=identity.get("kernels"))
    go_to(begun_in, resume)
    if memory is not None:
        settings = replace(settings, memory=memory)
    if checkpoint_minutes is not None:
        settings = replace(settings, checkpoint_minutes=checkpoint_minutes)
    return BegunRun(resume, folder, settings, identity)


def where_begun(stored: dict[str, Any], resume: Path) -> Path:
    """The folder from which a run's settings name files. Raises UsageError."""
    folder = stored.get("folder", ".")
    if not isinstance(folder, str) or "\0" in folder:
        raise UsageError(f"--resume {resume}: settings.json: folder: expected a text, got {folder!r:.80}")
    return Path(folder)


def go_to(folder: Path, resume: Path) -> None:
    """To where the run was begun: names of files in its settings are seen from there."""
    if folder == Path.cwd():
        return
    try:
        os.chdir(folder)
    except OSError as error:
        raise UsageError(
            f"--resume {resume}: the run was begun in {folder}, where its files are named from:"
            f" {error.strerror}"
        ) from None


def runs_code(spec: str) -> bool:
    """Whether a specification runs a file of somebody's. What nobody has vouched for here does."""
    try:
        return parse_spec(spec).name not in _NO_FILE
    except SpecError:
        return True


def words_to_resume(folder: Path, settings: PplSettings) -> str:
    """The command that goes on with a run."""
    words = ["verify", "ppl", "--resume", str(folder)]
    if runs_code(settings.baseline):
        words += ["--baseline", settings.baseline]
    for spec in settings.candidates:
        words += ["--candidate", spec] if runs_code(spec) else []
    words += ["--save-logits", settings.save_logits] if settings.save_logits else []
    return shlex.join(words)


def check_named_again(
    settings: PplSettings, named: Named, *, resume: Path, begun_in: Path, kernels: Any
) -> None:
    """Raises UsageError where something is not named that must be, or is that must not, or has changed.

    begun_in: the folder from which the run's settings name files; kernels: what the run stored of their
    identity.
    """
    command = words_to_resume(resume, settings)
    wanted = {"--candidate": [s for s in settings.candidates if runs_code(s)]}
    wanted["--baseline"] = [settings.baseline] if runs_code(settings.baseline) else []
    own = settings.candidates
    for spec in settings.baselines:
        # Found by the run, one a candidate: of code they are the baseline itself.
        if runs_code(spec) and spec not in (own if settings.baseline == OWN else [settings.baseline]):
            raise UsageError(
                f"--resume {resume}: settings.json: baselines: {spec} is no baseline of this run"
            )
    wanted["--save-logits"] = [settings.save_logits] if settings.save_logits else []
    given = {"--candidate": list(named.candidates)}
    given["--baseline"] = [named.baseline] if named.baseline else []
    given["--save-logits"] = [named.save_logits] if named.save_logits else []
    for option, values in wanted.items():
        for value in given[option]:
            if value not in values:
                raise UsageError(
                    f"--resume {resume}: the run goes on with its own settings, expected no {option} {value}"
                    " beside it"
                )
        for value in values:
            if value not in given[option]:
                what = "writes" if option == "--save-logits" else "runs"
                raise UsageError(
                    f"--resume {resume}: this run {what} {value}, which a folder alone cannot ask for: if you"
                    f" mean it, say so: {command}"
                )
            _check_place(option, value, resume=resume, begun_in=begun_in)
            if option != "--save-logits":
                _check_content(value, resume, begun_in, kernels)


def check_kernel(spec: str, *, resume: Path, begun_in: Path, kernels: Any) -> None:
    """Raises UsageError where a kernel that the command line names again is another than the run began with.

    kernels: marks (`kernel_mark`) that the run stored.
    """
    _check_place("--only", spec, resume=resume, begun_in=begun_in)
    _check_content(spec, resume, begun_in, kernels)


def kernel_mark(spec: str, folder: Path = Path()) -> str:
    """A specification, and which content its file has, where it runs one read here. Raises OSError."""
    if parse_spec(spec).name not in ("py", "merge"):
        return spec
    content = (folder / _file_of("--candidate", spec)).read_bytes()
    return f"{spec}@{hashlib.sha256(content).hexdigest()[:12]}"


def _file_of(option: str, value: str) -> str:
    if option == "--save-logits":
        return value
    spec = parse_spec(value)
    return spec.target.rpartition("::")[0] if spec.name in ("py", "merge") else spec.options.get("lib", "")


def _check_place(option: str, value: str, *, resume: Path, begun_in: Path) -> None:
    """What the command line names is named from here, what the run named from where it was begun."""
    if Path(_file_of(option, value)).is_absolute() or begun_in.resolve() == Path.cwd().resolve():
        return
    raise UsageError(
        f"--resume {resume}: {value} is named from {begun_in}, where the run was begun: go on from there"
    )


def _check_content(spec: str, resume: Path, begun_in: Path, kernels: Any) -> None:
    if parse_spec(spec).name not in ("py", "merge"):
        return
    file = begun_in / _file_of("--candidate", spec)
    try:
        found = kernel_mark(spec, begun_in)
    except OSError as error:
        raise UsageError(f"--resume {resume}: {file}: {error.strerror}") from None
    if not isinstance(kernels, list) or found not in kernels:
        raise UsageError(f"--resume {resume}: {file} changed since the run began")
