"""The colours of pages and pictures: what each is on paper, and in the dark.

A picture is drawn in the colours of paper; in a page each becomes a variable of that page's style sheet, so
that one file is right by day, at night and in print.
"""

from __future__ import annotations

import re

INK, GRID, ZERO = "#000000", "#eeeeee", "#666666"
BASELINE, FLOOR, HARM = "#1f5fa8", "#9a9a9a", "#b00020"
ARMS = {"exact": INK, "floor": FLOOR, "baseline": BASELINE, "control": BASELINE}
CANDIDATES = ("#c2410c", "#0f766e", "#7e22ce", "#a16207", "#be185d")
NOISE, OF_NOISE = "#c9d3df", "#8aa0b8"
MARGIN_BAND, OTHER_PLAN_BAND = "#e5ecf4", "#fdf1e3"

# On a dark page; a colour that is not here stays.
DARK = {
    INK: "#e6e9ed",
    GRID: "#2b323b",
    ZERO: "#9aa4af",
    BASELINE: "#79b0f0",
    HARM: "#ff7b8a",
    "#c2410c": "#ff9a62",
    "#0f766e": "#4fd1c5",
    "#7e22ce": "#c79bff",
    "#a16207": "#e3b341",
    "#be185d": "#ff86b9",
    NOISE: "#3d4854",
    MARGIN_BAND: "#243240",
    OTHER_PLAN_BAND: "#3a2e1f",
}


def variables(colours: dict[str, str]) -> str:
    """Declarations of a style sheet: a variable a colour of paper."""
    return " ".join(f"--c{paper[1:]}: {shown};" for paper, shown in colours.items())


def with_variables(svg: str) -> str:
    """A picture whose colours a page may change: variables, each with its own colour where none is set."""
    return re.sub(
        "|".join(DARK), lambda found: f"var(--c{found[0][1:]}, {found[0]})", svg, flags=re.IGNORECASE
    )
