"""Files in folders that may be a stranger's: no link is followed, nothing that waits is opened, nothing that
is not ours is written over.

What is written is there whole, or not at all: it goes into a new file beside its place, of a name that nobody
could have put there before, which is then renamed. A link that lies at its place is replaced, not followed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

# Ends the name of what is being written.
PART = ".part"
_OURS = re.compile(rf"\.(?P<name>.+)\.[0-9a-f]{{16}}{re.escape(PART)}")
# Nobody's JSON of ours is larger, nor nested deeper; a reader of anybody's must say no somewhere.
MOST_JSON_BYTES = 1 << 28
# Logs, texts and records that a command reads whole.
MOST_INPUT_BYTES = 1 << 28


def open_plain(path: Path) -> IO[bytes]:
    """A plain file, to be read. Raises OSError for a link, a pipe, a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is not a plain file", str(path))
        return os.fdopen(fd, "rb")
    except BaseException:
        with suppress(OSError):
            os.close(fd)
        raise


def read_json(path: Path) -> Any:
    """Raises OSError, or ValueError for what is no JSON: nested too deep, too large, not UTF-8."""
    with open_plain(path) as file:
        content = file.read(MOST_JSON_BYTES + 1)
    if len(content) > MOST_JSON_BYTES:
        raise ValueError(f"is larger than {MOST_JSON_BYTES} bytes")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("is nested too deep") from None


def read_input(path: Path, most: int = MOST_INPUT_BYTES) -> bytes:
    """A file that the user names, links followed. Raises OSError, for a device and too large a one too."""
    with path.open("rb", buffering=0) as file:
        of = os.fstat(file.fileno())
        if stat.S_ISCHR(of.st_mode) or stat.S_ISBLK(of.st_mode):
            raise OSError(errno.EINVAL, "is a device", str(path))
        found = bytearray()
        while piece := file.read(1 << 20):
            found += piece
            if len(found) > most:
                raise OSError(errno.EFBIG, f"has more than {most} bytes", str(path))
    return bytes(found)


def is_plain_folder(path: Path) -> bool:
    """Whether a folder, and no link to one, is there."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def is_plain_file(path: Path) -> bool:
    """Whether a file, and no link to one, is there."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new, empty file to write into, which then takes the place of `path`; gone where writing fails.

    Raises OSError.
    """
    part = _part_of(path)
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """The same for a folder, where none of that name may be."""
    part = _part_of(path)
    part.mkdir()
    try:
        yield part
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Raises OSError."""
    with written_whole(path) as part:
        part.write_bytes(content)


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{PART}")


def part_names(folder: Path) -> Iterator[tuple[Path, str]]:
    """What writing that was cut off has left there, and the name that it was to have."""
    with suppress(OSError):
        for path in sorted(folder.iterdir()):
            if (found := _OURS.fullmatch(path.name)) is not None:
                yield path, found["name"]


class Lock:
    """A folder held by one process, until `release` or its end, whatever that is.

    Raises BlockingIOError where another process holds it. File systems without locks have none.
    """

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise
        except OSError:
            pass

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.release()
