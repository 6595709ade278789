"""Texts whose backslashes an engine has expanded before it cut them into tokens: its tools' default."""

from __future__ import annotations

import re

_ESCAPE = re.compile(r"""\\(?:x(?P<hex>[0-9A-Fa-f]{2})|(?P<letter>[nrt'"\\]))""")
_LETTERS = {"n": "\n", "r": "\r", "t": "\t", "'": "'", '"': '"', "\\": "\\"}


def expanded(text: str) -> str:
    r"""The text as llama.cpp's tools read it without --no-escape.

    >>> expanded(r"a\n\\b\q\x41")
    'a\n\\b\\qA'
    """
    return _ESCAPE.sub(_character, text)


def _character(match: re.Match[str]) -> str:
    return _LETTERS[match["letter"]] if match["letter"] else chr(int(match["hex"], 16))
