"""A text file too long to be held: read from the disk a piece at a time, and never whole in memory."""

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from verify.data.errors import CorpusError

_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class LongText:
    """As `Corpus`, but without `text`: a file that was read for its hash, and is read again by `pieces`."""

    path: Path  # of the file
    name: str  # as it was asked for
    n_bytes: int  # of the file
    sha256: str  # of its bytes, hexadecimal
    identity: tuple[int, ...]  # device, inode, size, time of writing
    source: str = "file"  # always `file`
    notice: str | None = None  # as in `Corpus`

    def pieces(self, letters: int) -> Iterator[str]:
        """The text in pieces of at least this many letters, but the last; one trailing newline left out.

        Raises CorpusError where the file is not what it was, or cannot be read any more.
        """
        waiting = ""
        for piece in _decoded(self.path, self.identity):
            waiting += piece
            # The last letter waits: a newline at the end of the file is not of the text.
            while len(waiting) > letters:
                yield waiting[:letters]
                waiting = waiting[letters:]
        if waiting := waiting.removesuffix("\n"):
            yield waiting


def read_long_text(path: Path) -> LongText:
    """Read the file once: its hash, and that all of it is UTF-8. Raises CorpusError."""
    digest, size, identity = hashlib.sha256(), 0, _identity(path)
    for raw in _raw(path):
        digest.update(raw)
        size += len(raw)
    for _ in _decoded(path, identity):
        pass
    return LongText(path, path.name, size, digest.hexdigest(), identity)


def _identity(path: Path) -> tuple[int, ...]:
    try:
        of = path.stat()
    except OSError as error:
        raise CorpusError(f"{path}: file: expected a readable text file: {error.strerror or error}") from None
    return of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns


def _raw(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as file:
            while raw := file.read(_READ_BYTES):
                yield raw
    except OSError as error:
        raise CorpusError(f"{path}: file: expected a readable text file: {error.strerror or error}") from None


def _decoded(path: Path, identity: tuple[int, ...]) -> Iterator[str]:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    for raw in _raw(path):
        if _identity(path) != identity:
            raise CorpusError(f"{path}: file: changed while it was read")
        held = len(decoder.getstate()[0])
        yield _decode(decoder, raw, path, done - held)
        done += len(raw)
    _decode(decoder, b"", path, done - len(decoder.getstate()[0]), final=True)


def _decode(
    decoder: codecs.IncrementalDecoder, raw: bytes, path: Path, begins: int, *, final: bool = False
) -> str:
    """begins: the offset of the first byte that is not decoded yet."""
    try:
        return decoder.decode(raw, final)
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path}: text: expected UTF-8, found byte 0x{error.object[error.start]:02x} at byte offset"
            f" {begins + error.start}"
        ) from None


def is_long(path: Path, most: int) -> bool:
    """Whether a plain file of more than `most` bytes is there."""
    try:
        return path.is_file() and path.stat().st_size > most
    except (OSError, ValueError):
        return False
