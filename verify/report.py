"""`report.md`: the evidence of one run on a page that can be pasted into a pull request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jinja2

from verify.inplace import SAMPLED_ROWS

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("verify"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
)


def report_markdown(run: dict[str, Any]) -> str:
    """The report of a run, from the content of its run.json."""
    template = TEMPLATES.get_template("report.md.j2")
    return template.render(run=run, sampled=SAMPLED_ROWS, environment=list(flat(run["environment"])))


def flat(environment: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of everything that is known, nested names joined by a blank."""
    for key, value in environment.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key} ")
        elif value is not None:
            yield f"{prefix}{key}", value
