"""The kernel diff report as a page, made from `run.json` alone: now, or whenever it is asked for again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verify.reports.diff_pictures import diff_pictures
from verify.reports.page import Page, PageTable, Section
from verify.reports.tables import Column
from verify.reports.templating import figure, flat, says_something

LINE_COLUMNS: list[Column | str] = [
    Column("shape", "words"),
    *("n_kv", "err/budget"),
    Column("worst inputs", "word"),
    *("lse/budget", "rms/expected", "gain", "NMSE", "rms ratio"),
    Column("verdict", "word"),
]


def gravest(candidates: int) -> str:
    return f"the gravest of {candidates} candidates"


def line_cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    """One of `verify.diff.results.summary_lines` as text, under LINE_COLUMNS."""
    return (
        line["shape"],
        str(line["n_kv"]),
        figure(line["budget"]),
        line["budget_family"],
        figure(line["lse"]),
        figure(line["rms"]),
        figure(line["gain"], "%.1e"),
        figure(line["nmse"], "%.1e"),
        line["ratio"],
        line["verdict"],
    )


def diff_page(run: Mapping[str, Any], *, drawn: bool = True) -> Page:
    """The report of a diff, from its `run.json`; drawn: with pictures."""
    pairs = run["pairs"]
    alone = len(pairs) == 1
    sections = []
    for i, pair in enumerate(pairs):
        cells = [c for c in run["cells"] if c["spec"] == pair["candidate"]]
        sections.append(
            Section(
                heading=f"{pair['candidate']} against {pair['reference']}",
                verdict=pair["verdict"],
                # Reasons of one candidate alone stand above, beside the verdict.
                said=[
                    *([] if alone else pair["reasons"]),
                    *pair.get("looks_like", [])[:1],
                    *_seen(run, pair),
                ],
                pictures=diff_pictures(cells, prefix=f"c{i}-") if drawn else (),
                table=_lines_table(pair.get("lines", [])),
                aside=_ASIDE,
                code=[f"# the worst element alone\n{pair['again']}"] if pair.get("again") else (),
            )
        )
    sections.append(Section(heading="What ran", table=_coverage_table(run["coverage"])))
    reasons = pairs[0]["reasons"] if alone else [gravest(len(pairs))]
    return Page(
        command="diff",
        verdict=run["verdict"],
        reasons=reasons if pairs else run["reasons"],
        notes=run["notes"],
        sections=sections,
        again=[run["again"]] if run.get("again") else [],
        facts=list(flat(run["environment"])),
    )


_ASIDE = (
    "err/budget: the largest error over the bound derived from the kernel's arithmetic; above 1 is a bug."
    " rms/expected: root mean square of the error over what a correct kernel of this arithmetic shows. rms"
    " ratio: the candidate's error to float64 over the baseline's. Figures are the largest over the families"
    " of inputs of a line."
)


def _seen(run: Mapping[str, Any], pair: Mapping[str, Any]) -> list[str]:
    """What the diff would have seen of a candidate."""
    least = run["detectable"].get(pair["candidate"])
    return [] if least is None else [could_see(least)]


def could_see(least: float) -> str:
    """least: the smallest ratio that would have been seen in any kind of input."""
    if not says_something(least):
        return (
            "would have seen any error beyond its budget; of the rms ratio there is no limit that says"
            " anything in some kind of input"
        )
    return (
        f"would have seen an rms ratio from {least:.3g} in any kind of input, and any error beyond its budget"
    )


def _lines_table(lines: Sequence[Mapping[str, Any]]) -> PageTable:
    """The verdict stands beside the length: a phone shows the first columns."""
    shape, n_kv, *figures, verdict = (c if isinstance(c, str) else c.name for c in LINE_COLUMNS)
    rows = []
    for line in lines:
        (a, b, *between), cells = line_cells(line)[:-1], f"{line['cells']}, {line['covered']}"
        rows.append([a, b, line["verdict"], *between, cells])
    columns = (shape, n_kv, verdict, *figures, "cells, plan differed")
    return PageTable(columns, rows, ("shape", "worst inputs", "verdict"))


def _coverage_table(coverage: Sequence[Mapping[str, Any]]) -> PageTable:
    rows = [
        [
            line["spec"],
            f"{line['kernel']} {line['binary']}",
            "+".join(map(str, line["head_groups"])) or "not known",
            str(len(line["kv_cuts"]) - 1) if line["kv_cuts"] else "not known",
            str(line.get("tokens_a_call") or "as if alone"),
            str(line["rows"]),
            f"{line['n_kv_min']} to {line['n_kv_max']}",
        ]
        for line in coverage
    ]
    columns = ("kernel", "launched", "head groups", "KV parts", "T", "rows", "n_kv")
    return PageTable(columns, rows, ("kernel", "launched"))
