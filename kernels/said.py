"""Text that comes from elsewhere (a kernel, a library, a file), made fit to be shown, at the border.

What is shown on a terminal, in Markdown or on a page goes through here once, where it comes in.
"""

from __future__ import annotations

import re
from typing import Any

# A message longer than this says nothing more to a reader.
MOST_LETTERS = 2000
# Controls, halves of surrogate pairs, and marks that turn the direction of what follows.
_UNSEEN = "\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_CONTROLS = re.compile(f"[\x00-\x08\x0b-\x1f{_UNSEEN}]")


def visible(text: str) -> str:
    r"""Text with what steers a terminal or a page written out; tabs and newlines stay.

    >>> visible("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return _CONTROLS.sub(_written_out, text)


def all_visible(x: Any) -> Any:
    """What JSON held, with every text in it `visible`, names of fields too."""
    if isinstance(x, str):
        return visible(x)
    if isinstance(x, dict):
        return {visible(key): all_visible(value) for key, value in x.items()}
    return [all_visible(value) for value in x] if isinstance(x, list) else x


def one_line(text: str, most: int = MOST_LETTERS) -> str:
    """`visible` text in one line; of a longer one than `most` letters the beginning, and how long it is."""
    # Cut first, with room for spaces that go: cleaning megabytes for one line takes seconds.
    line = visible(" ".join(text[: 4 * most].split()))
    if len(line) <= most and len(text) <= 4 * most:
        return line
    return f"{line[:most]} ... ({len(text)} letters)"


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
