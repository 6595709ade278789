"""Drawing with matplotlib for a page: small figures, and SVG that can stand inside HTML with others.

matplotlib is loaded by the first figure: a command's help, and what it refuses, need none.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches: as wide as a phone, so that 9 points stay 9 points there.
SIZE = (4.9, 3.1)


class Picture(NamedTuple):
    """name: of the section it belongs to; caption: what it shows, in a sentence or two; svg: `<svg>...`."""

    name: str
    caption: str
    svg: str


def new_figure(height: float = SIZE[1]) -> tuple[Figure, Any]:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Names of arms are text, whatever dollars are in them.
    matplotlib.rcParams["text.parse_math"] = False
    figure = Figure(figsize=(SIZE[0], height))
    FigureCanvasSVG(figure)
    # Fixed edges in inches: a layout engine would take longer than the drawing.
    left, right, bottom, top = 0.85, 0.1, 0.5, 0.22
    axis = figure.add_axes(
        (
            left / SIZE[0],
            bottom / height,
            (SIZE[0] - left - right) / SIZE[0],
            (height - bottom - top) / height,
        )
    )
    axis.grid(True, color="#eeeeee", lw=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.xaxis.label.set_fontsize(9)
    axis.yaxis.label.set_fontsize(9)
    return figure, axis


def legend(axis: Any, entries: int) -> None:
    if entries and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, frameon=False, ncols=2 if entries > 3 else 1)


def plain_powers(axis: Any) -> None:
    """A logarithmic y axis with the powers of ten alone, or, within one power, some numbers between."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_ylim()
    if high / low < 20:
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    # Written as 1e-7: powers set as mathematics take longer than the rest of the picture.
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0e}".replace("e-0", "e-")))
    axis.yaxis.set_minor_locator(NullLocator())


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
    return Picture(name, caption, svg.strip())


def with_prefix(picture: Picture, prefix: str) -> Picture:
    """The picture with `prefix` before each of its ids."""
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", picture.svg)
    return picture._replace(svg=svg)
