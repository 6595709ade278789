"""From a name to a text: WikiText, any other data set, or a file.

The default text is WikiText-2's raw test file (Merity, Xiong, Bradbury, Socher 2016; CC BY-SA 3.0 and GFDL),
read through `datasets` and checked to the byte, so that figures can be laid beside those of other programs.
"""

import hashlib
import os
import sys
from pathlib import Path

from verify.data.corpus import Corpus, corpus_from_bytes
from verify.data.embedded import embedded_corpus
from verify.data.errors import CorpusError
from verify.data.hub import HubUnavailable, hub_rows
from verify.data.local import local_rows
from verify.data.long_text import LongText, is_long, read_long_text
from verify.data.rows import SPEC_FORM, DatasetSpec, join_rows, parse_spec

DEFAULT_CORPUS = "wikitext-2"
# As the name of a file; what it held, once it was read.
STANDARD_INPUT = "-"
_STANDARD_INPUT: list[bytes] = []
# A text file beyond this is read a piece at a time, and only as far as its windows reach.
LONG_TEXT_BYTES = 1 << 25
WIKITEXT = {
    "wikitext-2": DatasetSpec("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "wikitext-103": DatasetSpec("Salesforce/wikitext", "wikitext-103-raw-v1"),
}
# Others by name: the validation split of C4 in English, its first shard alone, and this program's own code.
OTHERS = {"c4": DatasetSpec("allenai/c4", "en", "validation")}
OWN_CODE = "own-code"
NAMED = (*WIKITEXT, *OTHERS, OWN_CODE)
WIKITEXT_2_BYTES = 1_290_590
WIKITEXT_2_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"


def read_text_file(path: str | os.PathLike[str]) -> Corpus:
    """The text of a file, byte-exact (line ends and a byte order mark are kept), named after the file.

    One trailing newline is not part of `text`, as with llama-perplexity's -f.

    Raises CorpusError for a file that is missing, a folder, unreadable, empty or not UTF-8.
    """
    if str(path) == STANDARD_INPUT:
        return corpus_from_bytes(_standard_input(), name="standard input", source="file")
    path = Path(path)
    try:
        if path.is_char_device():
            raise CorpusError(f"{path}: file: expected a text file, found a device")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CorpusError(f"{path}: file: expected a text file, found nothing there") from None
    except IsADirectoryError:
        raise CorpusError(f"{path}: file: expected a text file, found a folder") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CorpusError(f"{path}: file: expected a readable text file: {reason}") from None
    return corpus_from_bytes(raw, name=path.name, source="file", where=str(path))


def _standard_input() -> bytes:
    """All of it, read once a process. Raises CorpusError where a person would have to type it."""
    if not _STANDARD_INPUT:
        if sys.stdin is None or sys.stdin.isatty():
            raise CorpusError("-f -: expected a text on standard input, found a terminal")
        _STANDARD_INPUT.append(sys.stdin.buffer.read())
    return _STANDARD_INPUT[0]


def read_any_text(path: str | os.PathLike[str], *, most: int = LONG_TEXT_BYTES) -> Corpus | LongText:
    """`read_text_file`; a file of more than `most` bytes is not held in memory. Raises CorpusError."""
    return read_long_text(Path(path)) if is_long(Path(path), most) else read_text_file(path)


def load_corpus(name: str = DEFAULT_CORPUS, *, timeout_s: float = 5.0, allow_fallback: bool = True) -> Corpus:
    r"""The text called `name`.

    `c4`: the validation split of C4 in English. `own-code`: this program's own Python files.
    `wikitext-2` (checked against the size and hash of the published file) and `wikitext-103`: the raw test
    splits of `Salesforce/wikitext`. `ORG/NAME[:CONFIG[:SPLIT[:COLUMN]]]`: any data set of the hub, by
    default its split `test` and its column `text`. A local file or folder in place of ORG/NAME: that data
    set. How rows become a text: `verify.data.rows.join_rows`.

    What is in the local cache of `datasets` is read from there. Otherwise a hub that has given no sign of
    life `timeout_s` seconds after it is asked counts as unreachable; a download that has begun is not cut
    off. Where `wikitext-2` cannot be had, and `allow_fallback`, the embedded text is returned, with a
    `notice`.

    Raises CorpusError for an unknown name, a data set that cannot be had, a split, column or row that is
    not as expected, and for a WikiText-2 that differs from the published file.
    """
    if name in WIKITEXT:
        return _load_wikitext(name, timeout_s=timeout_s, allow_fallback=allow_fallback)
    if name == OWN_CODE:
        return corpus_from_bytes(_own_code(), name=name, source="file")
    spec = OTHERS.get(name) or (DatasetSpec(name) if _on_disk(name) else parse_spec(name))
    if _on_disk(spec.path):
        raw = join_rows(local_rows(spec)).encode("utf-8")
        return corpus_from_bytes(raw, name=name, source="file")
    _check_hub_name(name, spec)
    try:
        rows = hub_rows(spec, timeout_s=timeout_s)
    except HubUnavailable as error:
        raise CorpusError(
            f"corpus {name!r}: {error}; a text on this machine can be given with -f FILE"
        ) from error
    return corpus_from_bytes(join_rows(rows).encode("utf-8"), name=name, source="hub")


def _own_code() -> bytes:
    """The Python files beside this one, in the order of their names."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return b"\n".join(file.read_bytes() for file in files)


def check_wikitext_2(raw: bytes) -> None:
    """Raises CorpusError unless `raw` is, to the byte, the raw test file of WikiText-2."""
    sha256 = hashlib.sha256(raw).hexdigest()
    if (len(raw), sha256) != (WIKITEXT_2_BYTES, WIKITEXT_2_SHA256):
        raise CorpusError(
            f"wikitext-2: text: expected {WIKITEXT_2_BYTES} bytes with sha256 {WIKITEXT_2_SHA256}, "
            f"got {len(raw)} bytes with sha256 {sha256}"
        )


def _load_wikitext(name: str, *, timeout_s: float, allow_fallback: bool) -> Corpus:
    try:
        rows = hub_rows(WIKITEXT[name], timeout_s=timeout_s)
    except HubUnavailable as error:
        if name != DEFAULT_CORPUS or not allow_fallback:
            raise CorpusError(
                f"corpus {name!r}: {error}; a text on this machine can be given with -f FILE"
            ) from error
        return embedded_corpus(
            notice=f"{error}; an embedded text is used instead of WikiText-2: its figures must not be quoted"
        )
    raw = join_rows(rows).encode("utf-8")
    if name == "wikitext-2":
        check_wikitext_2(raw)
    return corpus_from_bytes(raw, name=name, source="hub")


def _on_disk(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except OSError:  # longer than a path may be, or inside a folder that may not be read
        return False


def _check_hub_name(name: str, spec: DatasetSpec) -> None:
    owner, slash, repo = spec.path.partition("/")
    if not (owner and slash and repo) or "/" in repo or owner in (".", "..", "~"):
        raise CorpusError(
            f"corpus {name!r}: expected {', '.join(NAMED)}, {SPEC_FORM}, or a data set's file or folder "
            f"(nothing is there under {spec.path!r}); a plain text goes to -f FILE"
        )
