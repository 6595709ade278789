"""Which commands leave a page, made from their `run.json` alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from verify.reports.diff_page import diff_page
from verify.reports.file_page import identify_page, kld_page, sweep_page
from verify.reports.law_page import judge_page, props_page
from verify.reports.only_page import only_page
from verify.reports.page import Page

# What ppl and gen leave has tables beside it: those have templates of their own.
PAGES: dict[str, Callable[..., Page]] = {
    "ppl-only": only_page,
    "diff": diff_page,
    "props": props_page,
    "judge": judge_page,
    "identify": identify_page,
    "kld": kld_page,
    "sweep": sweep_page,
}


def page_of(run: Mapping[str, Any], *, drawn: bool = True) -> Page:
    """The report of a run; drawn: with pictures."""
    return PAGES[run["command"]](run, drawn=drawn)
