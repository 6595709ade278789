"""The templates of every report, and what they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jinja2


def _is_page(name: str | None) -> bool:
    return name is not None and name.endswith(".html.j2")


# Values are escaped in pages, and only there.
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("verify.reports"),
    autoescape=_is_page,
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
)


def flat(environment: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything that is known, nested names joined by a blank."""
    for key, value in environment.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key} ")
        elif value is not None:
            yield f"{prefix}{key}", value
