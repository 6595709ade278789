"""A build's perplexity program: where it lies, and what it says of itself before it is run for an hour.

Asked first are `--version` and `--help`. A build that cannot start (a missing library, another machine's
code) answers neither. The help says which options there are, and whether `-fa` takes a value: older builds
have it as a flag.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from verify.kernels.foreign.lifeline import output_of, signal_name, tied_process
from verify.kernels.said import one_line
from verify.machine.errors import UsageError

PROGRAM_NAMES = ("llama-perplexity", "perplexity", "llama-perplexity.exe")
# One program for everything, which wants the command's name first.
UNIFIED_NAMES, UNIFIED_COMMAND = ("llama", "llama.exe"), "perplexity"
PROGRAM_FOLDERS = ("", "bin", "build/bin", "build")
_ANSWER_SECONDS = 60.0
_MOST_ANSWER = 1 << 20
# Exit codes of a shell or loader for what cannot be started.
_NOT_STARTED = (126, 127)
_NOT_LOADED = re.compile(
    r"error while loading shared libraries|cannot execute|symbol lookup error|not found \(required by"
)
_FLASH = ("-fa", "--flash-attn")
_OPTION = re.compile(r"(?:^|,)\s*(-{1,2}[A-Za-z][\w-]*)")
_VALUE_WORDS = ("on", "off", "auto", "1", "0", "true", "false", "enabled", "disabled")


class Program(NamedTuple):
    """A program, and the words that come before its options."""

    path: Path
    words: tuple[str, ...] = ()

    @property
    def argv(self) -> list[str]:
        return [str(self.path), *self.words]


class Build(NamedTuple):
    """What a build says of itself. trouble: why it cannot be started, its own line; None where it can.

    flash: whether `-fa` takes a value, is a flag alone, or is not known.
    """

    version: str | None
    options: frozenset[str]
    flash: Literal["value", "flag"] | None
    trouble: str | None


def find_program(build: str) -> Program:
    """The perplexity program of a build: itself, or a folder with it. Raises UsageError."""
    path = Path(build)
    if path.is_dir():
        for names in (PROGRAM_NAMES, UNIFIED_NAMES):
            for folder in PROGRAM_FOLDERS:
                for name in names:
                    if (path / folder / name).is_file():
                        return _program(path / folder / name)
        raise UsageError(
            f"{build}: no {PROGRAM_NAMES[0]} there, nor in its bin/ or build/bin/, nor the unified"
            f" {UNIFIED_NAMES[0]}"
        )
    if not path.is_file():
        raise UsageError(f"{build}: no such file or folder, expected a build's folder or llama-perplexity")
    return _program(path)


def _program(path: Path) -> Program:
    if not os.access(path, os.X_OK):
        raise UsageError(f"{path}: cannot be run: it is not executable")
    return Program(path.resolve(), (UNIFIED_COMMAND,) if path.name in UNIFIED_NAMES else ())


def ask(program: Program) -> Build:
    """What a program says to `--version` and `--help`. Raises nothing: what it cannot say is None."""
    said = {option: _answer([*program.argv, option]) for option in ("--version", "--help")}
    trouble = said["--version"][1] or said["--help"][1]
    found = re.search(r"^\s*(version:? .*)$", said["--version"][0], re.MULTILINE)
    help_text = said["--help"][0]
    return Build(
        version=found[1].strip() if found else None,
        options=frozenset(o for line in help_text.splitlines() for o in _named(line)),
        flash=_flash_form(help_text),
        trouble=trouble,
    )


def fitted(args: Sequence[str], build: Build) -> list[str]:
    """Options with `-fa` written as the build takes it: `-fa on` where it wants a value, `-fa` where not.

    Off is no option at all where `-fa` is a flag: it is the default there.
    """
    out: list[str] = []
    words = list(args)
    while words:
        word = words.pop(0)
        if word not in _FLASH or build.flash is None:
            out.append(word)
            continue
        value = words.pop(0) if words and words[0].lower() in _VALUE_WORDS else None
        if build.flash == "value":
            out += [word, value or "on"]
        elif value is None or value.lower() in ("on", "1", "true", "enabled", "auto"):
            out.append(word)
    return out


def unknown_options(args: Sequence[str], build: Build) -> list[str]:
    """Options that the build's help does not name; none where it has no help."""
    if not build.options:
        return []
    return [a for a in args if re.fullmatch(r"-{1,2}[A-Za-z][\w-]*", a) and a not in build.options]


def _named(line: str) -> list[str]:
    """The options that a line of help begins with: `-fa,  --flash-attn [on|off|auto]   set ...`."""
    if not line.lstrip().startswith("-"):
        return []
    names = []
    # Names end where a value or two spaces and a word begin.
    for part in re.split(r",\s*", line.strip()):
        match = re.match(r"(-{1,2}[A-Za-z][\w-]*)(\s|$)", part)
        if match is None:
            break
        names.append(match[1])
        if part.strip() != match[1]:
            break
    return names


def _flash_form(help_text: str) -> Literal["value", "flag"] | None:
    for line in help_text.splitlines():
        names = _named(line)
        if not set(names) & set(_FLASH):
            continue
        rest = line.strip()[line.strip().rindex(names[-1]) + len(names[-1]) :]
        # A value follows its option after one space; the description after more.
        value = re.match(r" ?(\[[^\]]*\]|<[^>]*>|\([^)]*\|[^)]*\)|\{[^}]*\}|[A-Z]+\b)", rest)
        return "value" if value else "flag"
    return None


def _answer(command: list[str]) -> tuple[str, str | None]:
    """What a command prints, and why it could not be started, or None."""
    try:
        with tied_process(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as done:
            said = output_of(done, _ANSWER_SECONDS, _MOST_ANSWER)
    except OSError as error:
        return "", f"cannot be started: {error.strerror or error}"
    except subprocess.TimeoutExpired:
        return "", f"did not answer {command[-1]} in {_ANSWER_SECONDS:g} s"
    text = said.decode("utf-8", errors="replace")
    if done.returncode in _NOT_STARTED or done.returncode < 0 or _NOT_LOADED.search(text):
        own = next((line.strip() for line in text.splitlines() if _NOT_LOADED.search(line)), "")
        own = own or next((line.strip() for line in text.splitlines() if line.strip()), "")
        how = signal_name(-done.returncode) if done.returncode < 0 else f"exit code {done.returncode}"
        return text, f"cannot be started ({how}): {one_line(own)}" if own else f"cannot be started ({how})"
    return text, None
