"""A report as data, and one design for all: verdict and meaning, sections, the command again, environment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from verify.reports.templating import TEMPLATES

if TYPE_CHECKING:
    # Only drawn pictures need matplotlib.
    from verify.reports.drawing import Picture


class PageTable(NamedTuple):
    """A table as text. words: the columns that hold words; the others hold figures."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page under one heading."""

    heading: str  # a few words
    verdict: str = ""  # of its own, beside the heading
    said: Sequence[str] = ()  # sentences, each a bullet
    pictures: Sequence[Picture] = ()  # side by side where there is room
    table: PageTable | None = None  # below the pictures
    aside: str = ""  # what the columns mean
    code: Sequence[str] = ()  # texts whose lines stay as they are
    folded: bool = False  # shown when it is asked for


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report; what its verdict means is said by `verify.judge.words`."""

    command: str  # of verify
    verdict: str  # one of `words_of(command)`
    reasons: Sequence[str]  # for it, sentences
    notes: Sequence[str] = ()  # what a reader must know
    subject: str = ""  # what was looked at
    sections: Sequence[Section] = ()  # in their order
    again: Sequence[str] = ()  # commands
    facts: Sequence[tuple[str, Any]] = ()  # what it ran on


def page_html(page: Page) -> str:
    """report.html: one file, everything in it."""
    return TEMPLATES.get_template("page.html.j2").render(page=page)


def page_markdown(page: Page) -> str:
    """report.md, for a comment: without pictures."""
    return TEMPLATES.get_template("page.md.j2").render(page=page)
