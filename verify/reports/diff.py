"""The kernel diff report: on the screen, as Markdown for a pull request, as one HTML file with pictures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np

from verify.diff.cells import Cell
from verify.diff.results import CandidateResult, DiffOutcome, LengthLine, command_of, detectable
from verify.machine.terminal import console_on, print_table_on
from verify.reports.tables import Column, table_of
from verify.reports.templating import TEMPLATES, flat
from verify.reports.verdict_lines import print_verdict


def summary_lines(result: CandidateResult) -> list[dict[str, Any]]:
    """One row a shape and length, in the order they ran: the worst of each figure over the inputs."""
    return [_row(line) for line in result.lines]


def _row(line: LengthLine) -> dict[str, Any]:
    cells = [c.candidate for c in line.cells]
    worst = max(line.cells, key=lambda c: c.candidate.severity)
    # Where every budget is vacuous none says anything, and no inputs are the worst.
    measured = [c.measures for c in cells if c.measures is not None]
    says = worst.candidate.severity > 0 or not measured or any(m.vacuous < 1 for m in measured)
    return {
        "shape": worst.inputs.shape,
        "n_kv": worst.inputs.n_kv,
        "verdict": line.decision.verdict,
        "budget": worst.candidate.figure("budget") if says else math.nan,
        "budget_family": worst.inputs.family if says else "no budget says anything",
        "lse": _largest([c.figure("lse") for c in cells]),
        "rms": _largest([c.figure("rms") for c in cells]),
        "gain": _largest([abs(c.figure("gain")) for c in cells]),
        "nmse": _largest([c.nmse for c in cells]),
        "ratio": _ratio(line),
        "cells": len(cells),
        "covered": sum(c.covered for c in line.cells),
    }


def _ratio(line: LengthLine) -> str:
    """R of the stratum that tells, with its own limits; or that errors are equal."""
    telling = line.strata.telling
    if telling is None:
        return "-"
    if telling.word == "equal":
        return "equal"
    return f"{telling.ratio:.3g} ({telling.low:.3g} to {telling.high:.3g})"


def _largest(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return max(known) if known else math.nan


_COLUMNS: list[Column | str] = [
    Column("shape", "words"),
    *("n_kv", "err/budget"),
    Column("worst inputs", "word"),
    *("lse/budget", "rms/expected", "gain", "NMSE", "rms ratio"),
    Column("verdict", "word"),
]


def print_outcome(outcome: DiffOutcome, to: TextIO) -> None:
    """A table a candidate, its verdict and why."""
    console = console_on(to)
    for result in outcome.candidates:
        rows = [
            (
                line["shape"],
                str(line["n_kv"]),
                _figure(line["budget"]),
                line["budget_family"],
                _figure(line["lse"]),
                _figure(line["rms"]),
                _figure(line["gain"], ".1e"),
                _figure(line["nmse"], ".1e"),
                line["ratio"],
                line["verdict"],
            )
            for line in summary_lines(result)
        ]
        console.print(f"{result.spec} against {result.baseline}")
        print_table_on(console, table_of(_COLUMNS, rows))
        if len(outcome.candidates) > 1:
            console.print(f"verdict: {result.verdict}: {'; '.join(result.reasons)}", soft_wrap=True)
        for alike in result.looks_like[:1]:
            console.print(alike, soft_wrap=True)
        if (worst := result.worst) is not None:
            again = command_of(outcome.settings, worst)
            console.print(f"worst element again: {again}", soft_wrap=True)
        least = detectable(result.strata)
        if least is not None and math.isfinite(least):
            seen = f"would have seen an rms ratio from {least:.3g} in any kind of input"
            console.print(f"{seen}, and any error beyond its budget", soft_wrap=True)
    several = len(outcome.candidates) > 1
    reasons = [_gravest(len(outcome.candidates))] if several else outcome.candidates[0].reasons
    print_verdict(outcome.verdict, reasons, to, outcome.notes)


def _gravest(candidates: int) -> str:
    return f"the gravest of {candidates} candidates"


def _figure(x: float, digits: str = ".3g") -> str:
    return "-" if math.isnan(x) else f"{x:{digits}}"


def diff_markdown(outcome: DiffOutcome) -> str:
    """The report for a pull request."""
    return TEMPLATES.get_template("diff.md.j2").render(**_content(outcome))


def diff_html(outcome: DiffOutcome) -> str:
    """One self-contained file: the tables, and a picture of each candidate's errors."""
    pictures = [picture(result) for result in outcome.candidates]
    return TEMPLATES.get_template("diff.html.j2").render(**_content(outcome), pictures=pictures)


def _content(outcome: DiffOutcome) -> dict[str, Any]:
    return {
        "run": outcome.run,
        "results": outcome.candidates,
        "tables": [summary_lines(result) for result in outcome.candidates],
        "environment": list(flat(outcome.run["environment"])),
        "figure": _figure,
    }


def picture(result: CandidateResult) -> str:
    """err/budget by head and inputs, error against n_kv, elements by err/budget: a PNG in base64."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (heat, lengths, histogram) = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    cells = [c for c in result.cells if c.candidate.heat.size]
    if cells:
        _draw_heat(figure, heat, cells)
        _draw_histogram(histogram, cells)
    drawn = [_draw_lengths(lengths, name, cells) for name in ("baseline", "candidate")]
    if any(drawn):
        lengths.set(xscale="log", yscale="log")
        lengths.legend()
    lengths.set(title="median relative error", xlabel="n_kv")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    pyplot.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _draw_heat(figure: Any, axis: Any, cells: Sequence[Cell]) -> None:
    """Largest err/budget of each query head and family, at the first shape."""
    shape = cells[0].inputs.shape
    found: dict[str, list[np.ndarray]] = {}
    for c in cells:
        if c.inputs.shape == shape:
            found.setdefault(c.inputs.family, []).append(c.candidate.heat.max(0))
    rows = np.array([np.max(heads, axis=0) for heads in found.values()])
    image = axis.imshow(rows, aspect="auto", vmin=0, vmax=max(1.0, float(rows.max())), cmap="magma")
    axis.set(title=f"err / budget, {shape}", xlabel="query head", yticks=range(len(rows)))
    axis.set_yticklabels(list(found), fontsize="small")
    figure.colorbar(image, ax=axis)


def _draw_histogram(axis: Any, cells: Sequence[Cell]) -> None:
    values = np.concatenate([c.candidate.ratios for c in cells])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size:
        axis.hist(np.log10(values), bins=80, log=True)
    axis.axvline(0.0, color="red", linestyle="--")
    axis.set(title="elements by err / budget", xlabel="log10(err / budget); the budget is at 0")


def _draw_lengths(axis: Any, name: str, cells: Sequence[Cell]) -> bool:
    """Whether there was an error to draw: an exact kernel has none, Inf none that fits."""
    found: dict[int, list[float]] = {}
    for c in cells:
        nmse = getattr(c, name).nmse
        if 0 < nmse < math.inf:
            found.setdefault(c.inputs.n_kv, []).append(math.sqrt(nmse))
    points = [(n, float(np.median(errors))) for n, errors in sorted(found.items())]
    axis.plot([n for n, _ in points], [error for _, error in points], marker="o", label=name)
    return bool(points)
