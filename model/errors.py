"""The one error of this package, and how it quotes what a file holds."""

from __future__ import annotations

import numpy as np


class ModelError(ValueError):
    """A model file, or a part of one, that cannot be used.

    The message is one line: the file, the field, and what was expected there.
    """


def short(value: object) -> str:
    """A value as an error quotes it: never long, never more than a line, no control characters."""
    if value is None:
        return "nothing"
    if isinstance(value, list | np.ndarray):
        return f"a list of {len(value)}"
    # repr of a long text would be as long again.
    text = repr(value[:60] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 60 else text[:57] + "..."
