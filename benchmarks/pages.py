"""Pages of docs/ with a table that a benchmark writes between two marks, and what stands in its cells."""

from __future__ import annotations

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def ratio_text(ratio: float | None, interval: list[float] | None, *, unknown: str = "-") -> str:
    """`0.745 (0.658 to 0.844)`: a ratio and its interval as a table's cell."""
    if ratio is None or interval is None:
        return unknown
    low, high = interval
    return f"{ratio:.3g} ({low:.3g} to {high:.3g})"


def between_marks(page: str, table: str) -> str:
    """The page with `table` between its marks. Raises ValueError where it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"page: expected {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
