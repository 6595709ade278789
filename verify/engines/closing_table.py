"""The table that whoever quantises a model publishes: a row a logits file, against the first.

    file  size  PPL  ln PPL(Q)/PPL(base)  mean KLD  99.9 % KLD  same top p  RMS dp

Every figure has an error. All but one are llama-perplexity's own, tokens as independent. A percentile's is
half the distance between the values one binomial standard deviation of rank above and below it:

    rank p n, deviation sqrt(p (1 - p) n); beyond the largest of n tokens it is the largest
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from verify.engines.kld_table import Estimate, Table, mean, percentile

TAIL = 0.999
HEADER = (
    "file", "size", "PPL", "ln PPL(Q)/PPL(base)", "mean KLD", "99.9 % KLD", "same top p", "RMS Δp",
)  # fmt: skip
_CSV_HEADER = (
    "file", "bytes", "ppl", "ppl_error", "ln_ppl_ratio", "ln_ppl_ratio_error", "kld_mean", "kld_mean_error",
    "kld_999", "kld_999_error", "same_top", "same_top_error", "rms_dp", "rms_dp_error",
)  # fmt: skip


class ClosingRow(NamedTuple):
    """One file. Everything but its name, size and perplexity is None for the base, and where it is broken."""

    # The file's name, or its model's.
    name: str
    # Bytes of its model, where that was given.
    size: int | None
    ppl: Estimate | None  # of the file
    ln_ratio: Estimate | None = None  # ln PPL / PPL(base)
    kld: Estimate | None = None  # mean, nats a token
    kld_tail: Estimate | None = None  # its quantile TAIL
    # Shares of 1.
    same_top: Estimate | None = None
    dp_rms: Estimate | None = None  # of the change of p of the token that came


def base_row(name: str, size: int | None, nll: np.ndarray) -> ClosingRow:
    """The base: nll of its scored tokens, any shape."""
    f = mean(nll.ravel().astype(np.float32).astype(np.float64))
    ppl = math.exp(f.value)
    return ClosingRow(name, size, Estimate(ppl, ppl * f.error))


def other_row(name: str, size: int | None, table: Table | None, kld: np.ndarray) -> ClosingRow:
    """Another file: its table against the base (None where a record is not a number), its divergences."""
    if table is None:
        return ClosingRow(name, size, None)
    return ClosingRow(
        name=name,
        size=size,
        ppl=table.ppl,
        ln_ratio=table.ln_ratio,
        kld=table.kld,
        kld_tail=percentile_estimate(kld.ravel(), TAIL),
        same_top=table.same_top,
        dp_rms=table.dp_rms,
    )


def percentile_estimate(x: np.ndarray, share: float) -> Estimate:
    """A percentile of x [n] and its standard error (see the module's text)."""
    deviation = math.sqrt(share * (1 - share) / len(x))
    low, high = (percentile(x, min(max(s, 0.0), 1.0)) for s in (share - deviation, share + deviation))
    return Estimate(percentile(x, share), (high - low) / 2)


def named(path: str, model: str | None) -> tuple[str, int | None]:
    """What a row calls its file, and its model's size in bytes. The model must exist."""
    if model is None:
        return Path(path).name, None
    return Path(model).name, Path(model).stat().st_size


def cells(row: ClosingRow) -> list[str]:
    """A row as text, under HEADER."""

    def written(e: Estimate | None, digits: int, factor: float = 1.0, unit: str = "") -> str:
        return "" if e is None else f"{factor * e.value:.{digits}f} ± {factor * e.error:.{digits}f}{unit}"

    return [
        row.name,
        "" if row.size is None else f"{row.size / 1e9:.2f} GB",
        written(row.ppl, 4) or "no number",
        "" if row.ln_ratio is None else f"{row.ln_ratio.value:+.5f} ± {row.ln_ratio.error:.5f}",
        written(row.kld, 6),
        written(row.kld_tail, 4),
        written(row.same_top, 2, 100, " %"),
        written(row.dp_rms, 2, 100, " %"),
    ]


def markdown(rows: Sequence[ClosingRow]) -> str:
    """The table in Markdown."""
    lines = [HEADER, ("---", *["---:"] * (len(HEADER) - 1)), *(cells(row) for row in rows)]
    return "".join(f"| {' | '.join(c.replace('|', '&#124;') for c in line)} |\n" for line in lines)


def comma_separated(rows: Sequence[ClosingRow]) -> str:
    """The table as CSV, all digits, shares of 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for row in rows:
        figures = [x for e in row[2:] for x in ((e.value, e.error) if e is not None else ("", ""))]
        writer.writerow([row.name, "" if row.size is None else row.size, *figures])
    return text.getvalue()
