"""Text as people paste and redirect it: UTF-16, colours, HTML's characters, drawn boxes."""

from __future__ import annotations

import codecs
import html
import re

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Escape sequences of terminals: colours, cursor moves, titles.
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_BARS = str.maketrans("│┃║¦", "||||")
# Of bytes without a mark: this share of zeros at one parity is UTF-16 of a Western text.
_ZEROS = 0.4


def plain_text(raw: bytes) -> str:
    """Lines with `|` for every bar, without colours and entities; what is no text becomes U+FFFD."""
    text = _decoded(raw)
    return html.unescape(_ESCAPES.sub("", text)).translate(_BARS)


def marked_text(raw: bytes) -> str:
    """As its mark says, else UTF-8. Raises UnicodeDecodeError."""
    for mark, encoding in _BOMS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding)
    return raw.decode("utf-8")


def _decoded(raw: bytes) -> str:
    for mark, encoding in _BOMS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding, errors="replace")
    head = raw[:4096]
    for first, encoding in ((0, "utf-16-be"), (1, "utf-16-le")):
        half = head[first::2]
        if half and half.count(0) > _ZEROS * len(half):
            return raw.decode(encoding, errors="replace")
    return raw.decode("utf-8", errors="replace")
