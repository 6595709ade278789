"""The one error of this package."""


class CorpusError(ValueError):
    """A text, a data set or a way of cutting it that cannot be used.

    The message is one line: the file or data set, the field, and what was expected there.
    """


def one_line(error: BaseException, limit: int = 200) -> str:
    """Somebody else's error as a clause of ours: `Type: first line of its message`, cut at `limit`."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
