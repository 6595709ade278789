"""`report.md`: the evidence of one run on a page that can be pasted into a pull request."""

from __future__ import annotations

from typing import Any

from verify.inplace import SAMPLED_ROWS
from verify.reports.templating import TEMPLATES, flat


def report_markdown(run: dict[str, Any]) -> str:
    """The report of a run, from the content of its run.json."""
    template = TEMPLATES.get_template("report.md.j2")
    return template.render(run=run, sampled=SAMPLED_ROWS, environment=list(flat(run["environment"])))
