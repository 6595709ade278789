"""Tables of plain text, on a terminal or in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TextIO

from rich.table import Table

from verify.machine.terminal import console_on, print_table_on


class Column(NamedTuple):
    """One column of a table, and how what is in it stands."""

    name: str
    # To the left, folded where there is little room; to the left, whole; to the right, whole; in the middle.
    kind: Literal["words", "word", "figure", "mark"] = "figure"
    min_width: int | None = None  # letters that words are not folded below


_SIDES: dict[str, Literal["left", "right", "center"]] = {"figure": "right", "mark": "center"}


def table_of(
    columns: Sequence[Column | str], rows: Iterable[Sequence[str]], *, title: str | None = None
) -> Table:
    """A row a line, without frames; a column that is only named holds figures."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for column in columns:
        name, kind, min_width = Column(column) if isinstance(column, str) else column
        table.add_column(
            name,
            justify=_SIDES.get(kind, "left"),
            no_wrap=kind in ("word", "figure"),
            overflow="fold" if kind == "words" else "ellipsis",
            min_width=min_width,
        )
    for row in rows:
        table.add_row(*row)
    return table


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], to: TextIO, *, words: int = 1) -> None:
    """The first `words` columns are words, the others figures."""
    kinds = [Column(name, "words" if i < words else "figure") for i, name in enumerate(columns)]
    print_table_on(console_on(to), table_of(kinds, rows))
