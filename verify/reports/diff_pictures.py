"""Pictures of a diff, drawn from the cells of its `run.json`.

By head and length, so that a regime of a plan is seen at a glance; on logarithmic scales, since errors span
decades.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from verify.reports.colours import BASELINE, CANDIDATES, HARM
from verify.reports.drawing import Picture, finish, heat_map, legend, new_figure, plain_powers, with_prefix
from verify.reports.templating import is_known

DiffCell = Mapping[str, Any]
# Of one candidate; what is drawn by head is drawn for the first of them.
MOST_SHAPES = 3
BUDGET_TICKS = (1e-3, 1e-2, 1e-1, 1.0)
RATIO_TICKS = (0.25, 0.5, 1.0, 2.0, 4.0)


@np.errstate(all="ignore")
def diff_pictures(cells: Sequence[DiffCell], *, prefix: str = "") -> list[Picture]:
    """Every picture that one candidate's cells have the data for; prefix: see `with_prefix`."""
    drawers: tuple[Callable[[Sequence[DiffCell]], Iterator[Picture]], ...] = (
        _budget_by_head,
        _ratio_by_head,
        _budget_by_family,
        _error_by_length,
        _elements,
    )
    drawn = [picture for draw in drawers for picture in draw(cells)]
    return [with_prefix(picture, f"{prefix}{i}-") for i, picture in enumerate(drawn)]


def _budget_by_head(cells: Sequence[DiffCell]) -> Iterator[Picture]:
    for shape, of_shape in _shapes(cells):
        rows = _by_length(of_shape, "budget", lambda heads: np.nanmax(heads, axis=0))
        yield from _heads(
            rows,
            f"err/budget, {shape}",
            ticks=BUDGET_TICKS,
            colours="Blues",
            caption=f"{shape}: largest error over its bound, by query head and length, over all inputs. Red:"
            " above 1, a bug.",
        )


def _ratio_by_head(cells: Sequence[DiffCell]) -> Iterator[Picture]:
    for shape, of_shape in _shapes(cells):
        rows = _by_length(of_shape, "ratio", lambda heads: np.exp(np.nanmean(np.log(heads), axis=0)))
        yield from _heads(
            rows,
            f"ratio, {shape}",
            ticks=RATIO_TICKS,
            colours="RdBu_r",
            caption=f"{shape}: the candidate's rms error to float64 over the baseline's, by query head and"
            " length (geometric mean over inputs). Blue: closer to exact; a change of plan shows as a step.",
        )


def _budget_by_family(cells: Sequence[DiffCell]) -> Iterator[Picture]:
    known = [c for c in cells if is_known(c["max_budget_ratio"])]
    lengths, families = sorted({c["n_kv"] for c in cells}), list(dict.fromkeys(c["family"] for c in known))
    if len(families) < 2:
        return
    values = np.full((len(families), len(lengths)), np.nan)
    for c in known:
        at = families.index(c["family"]), lengths.index(c["n_kv"])
        values[at] = np.nanmax([values[at], c["max_budget_ratio"]])
    ticks, names = BUDGET_TICKS, [name[:_LONGEST_NAME] for name in families]
    drawn = heat_map(values, names, ticks=ticks, colours="Blues", xlabel="n_kv", ylabel="")
    drawn.axes[0].set_xticks(range(len(lengths)), [str(n) for n in lengths])
    yield finish(
        "family", drawn, "Largest error over its bound, by kind of input and length. Red: above 1, a bug."
    )


def _error_by_length(cells: Sequence[DiffCell]) -> Iterator[Picture]:
    figure, axis = new_figure()
    drawn = 0
    for name, colour in (("baseline", BASELINE), ("candidate", CANDIDATES[0])):
        found: dict[int, list[float]] = {}
        for c in cells:
            nmse = (c["baseline"] if name == "baseline" else c)["nmse"]
            # An exact kernel has no error to draw.
            if is_known(nmse) and nmse > 0:
                found.setdefault(c["n_kv"], []).append(math.sqrt(nmse))
        points = [(n, float(np.median(errors))) for n, errors in sorted(found.items())]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", ms=4, color=colour, label=name)
            drawn += 1
    if not drawn:
        return
    axis.set(xscale="log", yscale="log", xlabel="n_kv", ylabel="relative error")
    lengths = sorted({c["n_kv"] for c in cells})
    axis.set_xticks(lengths, [str(n) for n in lengths])
    axis.set_xticks([], minor=True)
    plain_powers(axis)
    legend(axis, drawn)
    yield finish(
        "lengths", figure, "Relative error to float64 against the number of keys, median over inputs."
    )


def _elements(cells: Sequence[DiffCell]) -> Iterator[Picture]:
    found: dict[int, int] = {}
    step = 1.0
    for c in cells:
        if (of_cell := c.get("elements")) is not None:
            step = of_cell["step"]
            first = round(of_cell["first"] / step)
            for i, count in enumerate(of_cell["counts"]):
                found[first + i] = found.get(first + i, 0) + count
    found = {i: count for i, count in found.items() if count}
    if not found:
        return
    figure, axis = new_figure()
    axis.bar(
        [10 ** (i * step) for i in found],
        list(found.values()),
        width=[10 ** ((i + 1) * step) - 10 ** (i * step) for i in found],
        align="edge",
        color=[HARM if i >= 0 else BASELINE for i in found],
    )
    axis.axvline(1, color=HARM, ls="--", lw=1)
    axis.set(xscale="log", yscale="log", xlabel="|error| / budget; the bound is at 1", ylabel="elements")
    plain_powers(axis)
    plain_powers(axis, along="x")
    yield finish("elements", figure, "Checked elements by how much of its bound the error of each takes up.")


# Letters beside a heat map.
_LONGEST_NAME = 14


def _heads(
    rows: Mapping[int, np.ndarray], name: str, *, ticks: Sequence[float], colours: str, caption: str
) -> Iterator[Picture]:
    values = np.array(list(rows.values()))
    if not values.size or not np.isfinite(values).any():
        return
    names = [str(n) for n in rows]
    drawn = heat_map(values, names, ticks=ticks, colours=colours, xlabel="query head", ylabel="n_kv")
    yield finish(name, drawn, caption)


def _by_length(
    cells: Sequence[DiffCell], figure: str, over: Callable[[np.ndarray], np.ndarray]
) -> dict[int, np.ndarray]:
    """A figure of each head by length, from all inputs of a length."""
    found: dict[int, list[list[float]]] = {}
    for c in cells:
        heads = [x if is_known(x) and x > 0 else math.nan for x in c.get("by_head", {}).get(figure, [])]
        if any(map(is_known, heads)):
            found.setdefault(c["n_kv"], []).append(heads)
    # A head of which nothing is known stays blank.
    return {n: _quiet(over, np.array(found[n])) for n in sorted(found)}


def _quiet(over: Callable[[np.ndarray], np.ndarray], heads: np.ndarray) -> np.ndarray:
    known = np.isfinite(heads).any(axis=0)
    made = np.full(heads.shape[1], np.nan)
    made[known] = over(heads[:, known])
    return made


def _shapes(cells: Sequence[DiffCell]) -> Iterator[tuple[str, list[DiffCell]]]:
    for shape in list(dict.fromkeys(c["shape"] for c in cells))[:MOST_SHAPES]:
        yield shape, [c for c in cells if c["shape"] == shape]
