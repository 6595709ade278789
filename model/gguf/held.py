"""What a model file was when it was opened, held to the end: figures and the name of a model go together.

A run reads a file for hours. Replaced, removed or written over meanwhile, it would give the figures of one
file under the name of another.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from verify.model.errors import ModelError

SAMPLE_BYTES = 1 << 20


class ModelChanged(ModelError):
    """A model's file is not what it was when it was opened."""


class Held(NamedTuple):
    """One file as it was opened. place: device and inode; times in ns; sample: hash of its name, size, first
    and last mebibytes."""

    place: tuple[int, int]
    size: int
    modified: int
    changed: int
    sample: bytes


def held(path: Path, fd: int) -> Held:
    """Of an open file. Raises OSError."""
    of = os.fstat(fd)
    digest = hashlib.sha256(f"{path.name}:{of.st_size}".encode())
    # As much memory is taken as is asked for, however short the file.
    some = min(SAMPLE_BYTES, of.st_size)
    digest.update(os.pread(fd, some, 0))
    digest.update(os.pread(fd, some, of.st_size - some))
    return Held((of.st_dev, of.st_ino), of.st_size, of.st_mtime_ns, of.st_ctime_ns, digest.digest())


def check_held(path: Path, then: Held) -> None:
    """Raises ModelChanged where the file of this name is not, or no longer, the one that was opened."""
    try:
        of = path.stat()
    except OSError as error:
        raise ModelChanged(f"{path}: is gone since it was opened: {error.strerror or error}") from None
    if (of.st_dev, of.st_ino) != then.place:
        raise ModelChanged(f"{path}: was replaced by another file since it was opened")
    if of.st_size != then.size:
        raise ModelChanged(f"{path}: has {of.st_size} bytes now, and had {then.size} when it was opened")
    if of.st_mtime_ns != then.modified:
        raise ModelChanged(f"{path}: was written to since it was opened")
    # Its time of writing can be set back. A new name or mode changes this one too, and does no harm.
    if of.st_ctime_ns != then.changed and _sample_of(path) != then.sample:
        raise ModelChanged(f"{path}: holds other bytes than when it was opened")


def _sample_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return held(path, file.fileno()).sample
    except OSError as error:
        raise ModelChanged(f"{path}: cannot be read any more: {error.strerror or error}") from None


def fingerprint(files: list[Held]) -> str:
    """Hash of the sizes, first and last mebibytes of a model's files: cheap, and enough to tell two apart."""
    samples = [one.sample for one in files]
    return (samples[0] if len(samples) == 1 else hashlib.sha256(b"".join(samples)).digest()).hex()
