"""A data set's rows: which ones a specification names, and the text they make together."""

from collections.abc import Sequence
from dataclasses import dataclass

from verify.data.errors import CorpusError

SPEC_FORM = "ORG/NAME[:CONFIG[:SPLIT[:COLUMN]]]"

# What WikiText's files hold where its data set has an empty row.
_BLANK_LINE = " \n"


@dataclass(frozen=True)
class DatasetSpec:
    """Rows of one column of one split. `path` is ORG/NAME on the hub, or a local file or folder."""

    path: str
    config: str | None = None
    split: str = "test"
    column: str = "text"


def parse_spec(text: str) -> DatasetSpec:
    """`PATH[:CONFIG[:SPLIT[:COLUMN]]]`; an empty field takes its default (no configuration, `test`, `text`).

    >>> parse_spec("org/name::validation")
    DatasetSpec(path='org/name', config=None, split='validation', column='text')

    Raises CorpusError where the path is empty or there are more than four fields.
    """
    path, *fields = text.split(":")
    if not path or len(fields) > 3:
        raise CorpusError(f"corpus {text!r}: expected {SPEC_FORM}")
    config, split, column = (*fields, "", "", "")[:3]
    return DatasetSpec(path, config or None, split or "test", column or "text")


def join_rows(rows: Sequence[str]) -> str:
    r"""The text that the rows of a data set make, by one of two rules that the rows themselves decide.

    Rows that carry their line ends (every non-empty row but the last ends with "\n") are the lines of a
    file: they are joined as they are, an empty row standing for WikiText's blank line " \n". So WikiText's
    rows, from the hub or from anybody's copy of it, give its raw file to the byte. All other rows are
    joined by "\n".

    >>> join_rows([" = Title = \n", "", " Prose . \n"])
    ' = Title = \n \n Prose . \n'
    >>> join_rows(["one document", "", "another"])
    'one document\n\nanother'
    """
    complete = [row for row in rows[:-1] if row]
    if complete and all(row.endswith("\n") for row in complete):
        return "".join(row or _BLANK_LINE for row in rows)
    return "\n".join(rows)
