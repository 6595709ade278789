"""Drawing with matplotlib for a page: small figures, and SVG that can stand inside HTML with others.

matplotlib is loaded by the first figure: a command's help, and what it refuses, need none.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from verify.reports.colours import GRID, HARM, with_variables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches: as wide as a phone, so that 9 points stay 9 points there.
SIZE = (4.9, 3.1)
# Letters of names of which four stand side by side.
_SHORT_NAME = 12
# Inches of a scale of colours and its numbers.
_SCALE = 0.7


class Picture(NamedTuple):
    """name: of the section it belongs to; caption: what it shows, in a sentence or two; svg: `<svg>...`."""

    name: str
    caption: str
    svg: str


def load_drawing() -> None:
    """For a thread beside what takes long: the first figure would wait for it."""
    from matplotlib.backends import backend_svg  # noqa: F401
    from matplotlib.figure import Figure  # noqa: F401


def new_figure(height: float = SIZE[1], *, left: float = 0.85, right: float = 0.1) -> tuple[Figure, Any]:
    """A figure of SIZE's width with one pair of axes; height, and the room beside them, in inches."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Names of arms are text, whatever dollars are in them.
    matplotlib.rcParams["text.parse_math"] = False
    figure = Figure(figsize=(SIZE[0], height))
    FigureCanvasSVG(figure)
    # Fixed edges in inches: a layout engine would take longer than the drawing.
    bottom, top = 0.5, 0.36
    axis = figure.add_axes(
        (
            left / SIZE[0],
            bottom / height,
            (SIZE[0] - left - right) / SIZE[0],
            (height - bottom - top) / height,
        )
    )
    axis.grid(True, color=GRID, lw=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.xaxis.label.set_fontsize(9)
    axis.yaxis.label.set_fontsize(9)
    return figure, axis


def legend(axis: Any, entries: int) -> None:
    """Above the axes, where it hides nothing."""
    if entries and (names := axis.get_legend_handles_labels()[1]):
        axis.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0.1,
            fontsize=8,
            frameon=False,
            ncols=2 if max(map(len, names)) > _SHORT_NAME else 4,
        )


def plain_powers(axis: Any, *, along: str = "y") -> None:
    """A logarithmic axis, y or x: its powers of ten alone, or, within few powers, some numbers between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_ylim() if along == "y" else axis.get_xlim()
    of = axis.yaxis if along == "y" else axis.xaxis
    if high / low < 3:
        of.set_major_locator(MaxNLocator(4))
    elif high / low < 20:
        of.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    of.set_major_formatter(FuncFormatter(lambda x, _: _plain(x, 2 if high / low < 3 else 1)))
    of.set_minor_locator(NullLocator())


def plain_numbers(axis: Any) -> None:
    """A linear y axis whose numbers are written out, each with its own power of ten."""
    from matplotlib.ticker import FuncFormatter

    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _plain(y, 2)))


# Label, xs, ys and colour of a line.
PerplexityLine = tuple[str, Sequence[float], Sequence[float], str]


def perplexity_lines(
    name: str,
    lines: Sequence[PerplexityLine],
    *,
    xlabel: str,
    caption: str,
) -> Picture | None:
    """Perplexities along an axis; lines of one point are left out."""
    picture, axis = new_figure()
    drawn = [line for line in lines if len(line[1]) > 1]
    for label, xs, ys, colour in drawn:
        axis.plot(xs, ys, "." if len(xs) > 60 else ".-", lw=1, ms=5, color=colour, label=label)
    if not drawn:
        return None
    axis.set(xlabel=xlabel, ylabel="PPL")
    axis.xaxis.get_major_locator().set_params(integer=True)
    plain_numbers(axis)
    legend(axis, len(drawn) if len(drawn) > 1 else 0)
    return finish(name, picture, caption)


# What the pictures of perplexity say below them, by name.
PERPLEXITY_CAPTIONS = {
    "by_window": ("window", "Perplexity of each window."),
    "by_position": ("n_kv", "Perplexity by the number of visible keys, in equal parts of the window."),
}


def _plain(x: float, digits: int) -> str:
    """As 1e-7: powers that are set as mathematics take longer than the rest of the picture."""
    if x == 0 or 1e-3 < abs(x) < 1e4:
        # Ticks at 12.5 and 15 are two numbers, and no finer ones are drawn.
        return f"{x:.{max(digits + 1, 4) if abs(x) >= 10 else digits + 1}g}"
    mantissa, power = f"{x:.{digits - 1}e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def heat_map(
    values: np.ndarray,
    lengths: Sequence[str],
    *,
    ticks: Sequence[float],
    colours: str,
    xlabel: str,
    ylabel: str,
) -> Figure:
    """A picture of values [rows, columns] > 0 on a logarithmic scale of colours; NaN stays blank.

    ticks: of the scale, its first and last are its ends; lengths: names of the rows, from below.
    """
    import matplotlib
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import NullLocator

    low, high = ticks[0], ticks[-1]
    height, left = min(1.25 + 0.24 * len(lengths), 3.4), 0.5 + 0.055 * max(map(len, lengths))
    figure, axis = new_figure(height, left=left, right=_SCALE)
    axis.grid(visible=False)
    map_of = matplotlib.colormaps[colours].with_extremes(over=HARM)
    edges = np.arange(values.shape[1] + 1) - 0.5, np.arange(values.shape[0] + 1) - 0.5
    image = axis.pcolormesh(*edges, np.ma.masked_invalid(values), norm=LogNorm(low, high), cmap=map_of)
    axis.set_yticks(range(len(lengths)), lengths)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    place = axis.get_position()
    beside = figure.add_axes((place.x1 + 0.1 / SIZE[0], place.y0, 0.12 / SIZE[0], place.height))
    bar = figure.colorbar(image, cax=beside, extend="max")
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_ticks(list(ticks), labels=[f"{x:g}" for x in ticks])
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    return figure


def plain_ratios(axis: Any) -> None:
    """Ticks of a logarithmic axis of ratios near 1, written as ratios."""
    low, high = axis.get_xlim()
    steps = (0.1, 0.2, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
    inside = [x for x in steps if low <= x <= high]
    chosen = list(_spread(inside, math.log(high / low)))
    axis.set_xticks(chosen, [f"{x:g}" for x in chosen])
    axis.set_xticks([], minor=True)


def _spread(ticks: list[float], width: float) -> Iterator[float]:
    """Those ticks that leave room for one another; 1 always stays."""
    kept: list[float] = []
    for x in sorted(ticks, key=lambda x: (x != 1.0, abs(math.log(x)))):
        if all(abs(math.log(x / other)) > width / 14 for other in kept):
            kept.append(x)
    yield from sorted(kept)


def finish(name: str, figure: Figure, caption: str) -> Picture:
    import matplotlib

    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    # Text stays text; ids are made from the salt, so that no two pictures of a page share one.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Ids of groups are the same in every picture and nothing refers to them.
    svg = re.sub(r'<g id="[a-z0-9.]+_\d+"', "<g", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" ?', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*" ?', r"\1", svg, count=1)
    return Picture(name, caption, with_variables(svg.strip()))


def with_prefix(picture: Picture, prefix: str) -> Picture:
    """The picture with `prefix` before each of its ids."""
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", picture.svg)
    return picture._replace(svg=svg)
