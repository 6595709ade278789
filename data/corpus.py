"""A text with its identity: where it came from, its size and its hash."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from verify.data.errors import CorpusError


@dataclass(frozen=True)
class Corpus:
    """A text to evaluate on."""

    name: str  # as it was asked for
    source: str  # "hub" | "file" | "embedded"
    text: str  # the bytes, decoded, less one trailing newline
    n_bytes: int  # of the raw bytes
    sha256: str  # of the raw bytes, hexadecimal
    notice: str | None = None  # one line that readers of figures must be shown, or None

    def pieces(self, letters: int) -> Iterator[str]:
        """`text` in slices of this length."""
        return (self.text[at : at + letters] for at in range(0, len(self.text), letters))


def utf16_of(raw: bytes) -> str | None:
    """What to do about a text whose beginning is UTF-16, as Windows writes it; None where it is not.

    >>> utf16_of("ab".encode("utf-16-le"))
    'expected UTF-8, found UTF-16: convert it with iconv -f UTF-16LE -t UTF-8'
    """
    start = raw[: 1 << 10]
    kind = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}.get(start[:2])
    if kind is None:
        # Without a mark: every second byte of plain letters is zero.
        halves = {"UTF-16BE": start[0::2], "UTF-16LE": start[1::2]}
        kind = next((name for name, half in halves.items() if half and half.count(0) > len(half) // 2), None)
    return kind and f"expected UTF-8, found UTF-16: convert it with iconv -f {kind} -t UTF-8"


def corpus_from_bytes(
    raw: bytes, *, name: str, source: str, where: str | None = None, notice: str | None = None
) -> Corpus:
    """The corpus of these raw bytes. `where` (default: `name`) is what an error calls them.

    Raises CorpusError where the bytes are not UTF-8 (naming the byte offset) or hold no text.
    """
    where = where or name
    if (wide := utf16_of(raw)) is not None:
        raise CorpusError(f"{where}: text: {wide}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where}: text: expected UTF-8, found byte 0x{raw[error.start]:02x} at byte offset {error.start}"
        ) from None
    # One newline and no more, and not the CR before it: what llama-perplexity drops from the file of -f. The
    # tokens, and so the perplexity, depend on it.
    text = text.removesuffix("\n")
    if not text:
        raise CorpusError(
            f"{where}: text: expected at least one character, found {len(raw)} bytes and no text"
        )
    return Corpus(
        name=name,
        source=source,
        text=text,
        n_bytes=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
        notice=notice,
    )
