"""Files that a command will write at its end: whether they can be is asked at the beginning."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from verify.machine.errors import UsageError


def check_writable(option: str, path: str | Path, read: Iterable[str | Path | None] = ()) -> None:
    """Raises UsageError that names the option, where no file can be written there. Writes nothing.

    read: files that the command reads, or writes too, which are not to be written over.
    """
    file = Path(path)
    for other in read:
        if other is not None and _same(file, Path(other)):
            raise UsageError(f"{option} {path}: is {other}, which the command reads: expected another name")
    folder = file.resolve().parent
    if file.is_dir():
        raise UsageError(f"{option} {path}: is a folder, expected the name of a file")
    if not folder.is_dir():
        raise UsageError(f"{option} {path}: no such folder: {folder}")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise UsageError(f"{option} {path}: cannot be written")


def _same(file: Path, other: Path) -> bool:
    try:
        return file.samefile(other)
    except (OSError, ValueError):
        # One of the two is not there.
        return file.resolve() == other.resolve()


def make_folder(option: str, path: Path) -> None:
    """Raises UsageError that names the option, where there is no such folder and none can be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written: {error.strerror or error}") from None


def check_new_folder(out: Path | None) -> None:
    """Raises UsageError where `write_run` could not write there, before anything is measured."""
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out}: expected a new or an empty folder")
