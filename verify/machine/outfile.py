"""Files that a command will write at its end: whether they can be is asked at the beginning."""

from __future__ import annotations

import os
from pathlib import Path

from verify.machine.errors import UsageError


def check_writable(option: str, path: str | Path) -> None:
    """Raises UsageError that names the option, where no file can be written there. Writes nothing."""
    file = Path(path)
    folder = file.resolve().parent
    if file.is_dir():
        raise UsageError(f"{option} {path}: is a folder, expected the name of a file")
    if not folder.is_dir():
        raise UsageError(f"{option} {path}: no such folder: {folder}")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise UsageError(f"{option} {path}: cannot be written")


def make_folder(option: str, path: Path) -> None:
    """Raises UsageError that names the option, where there is no such folder and none can be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written: {error.strerror or error}") from None
