"""What `verify ppl --only` shows: the closing table as those who quantise models publish it, and its page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from verify.reports.colours import BASELINE, CANDIDATES
from verify.reports.drawing import PERPLEXITY_CAPTIONS, PerplexityLine, Picture, perplexity_lines
from verify.reports.page import Page, PageTable, Section
from verify.reports.templating import figure, flat

OnlyRow = Mapping[str, Any]
_HEADER = (
    "model",
    "size",
    "bits a weight",
    "text",
    "PPL",
    "ln PPL(Q)/PPL(base)",
    "mean Δp",
    "RMS Δp",
    "same top p",
)
_PAIRED = ("ln_ratio", "dp", "dp_rms", "same_top")
_OF_ROW = ("model", "bytes", "bits_per_weight", "text", "n_ctx", "windows", "ppl", "ppl_se")
_CSV_HEADER = (
    *(*_OF_ROW[:-1], "ppl_error"),
    *(name for kind in _PAIRED for name in (kind, f"{kind}_error")),
)
# Lines of a picture, and windows that are drawn.
MOST_LINES = 1 + len(CANDIDATES)


def header(rows: Sequence[OnlyRow]) -> list[str]:
    """Columns of the closing table: those of what there is but one of are left out."""
    several = len({row["text_sha256"] for row in rows}) > 1
    paired = any(row["against"] for row in rows)
    gone = {*(() if several else ("text",)), *(() if paired else _HEADER[5:])}
    return [name for name in _HEADER if name not in gone]


def closing_cells(row: OnlyRow) -> dict[str, str]:
    """One model on one text, by the names of _HEADER; nothing where it is the base or has other tokens."""
    against = row["against"] or {}

    def paired(name: str, form: str, factor: float = 1.0, unit: str = "") -> str:
        found = against.get(name)
        if not found:
            return ""
        value, error = (
            figure(factor * found[x], y) for x, y in (("value", form), ("error", form.replace("+", "")))
        )
        return f"{value} ± {error}{unit}"

    return {
        "model": PurePath(row["model"]).name,
        "size": f"{row['bytes'] / 1e9:.3g} GB",
        "bits a weight": f"{row['bits_per_weight']:.2f}",
        "text": row["text"],
        "PPL": f"{figure(row['ppl'], '%.4f')} ± {figure(row['ppl_se'], '%.5f')}",
        "ln PPL(Q)/PPL(base)": paired("ln_ratio", "%+.6f"),
        "mean Δp": paired("dp", "%+.3f", 100, " %"),
        "RMS Δp": paired("dp_rms", "%.3f", 100, " %"),
        "same top p": paired("same_top", "%.2f", 100, " %"),
    }


def closing_table(rows: Sequence[OnlyRow]) -> PageTable:
    columns = header(rows)
    texts = [[cells[name] for name in columns] for cells in map(closing_cells, rows)]
    return PageTable(columns, texts, ("model", "text"))


def only_markdown(rows: Sequence[OnlyRow]) -> str:
    """The closing table in Markdown."""
    columns, texts, words = closing_table(rows)
    rules = ["---" if name in words else "---:" for name in columns]
    return "".join(
        f"| {' | '.join(c.replace('|', '&#124;') for c in line)} |\n" for line in (columns, rules, *texts)
    )


def only_csv(rows: Sequence[OnlyRow]) -> str:
    """The same as CSV: all digits, shares of 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for row in rows:
        against = row["against"] or {}
        paired = [x for kind in _PAIRED for x in (against[kind].values() if against else ("", ""))]
        writer.writerow([*(row[name] for name in _OF_ROW), *paired])
    return text.getvalue()


def only_page(run: Mapping[str, Any], *, drawn: bool = True) -> Page:
    """Perplexity of one kernel, over models and texts; drawn: with pictures."""
    rows, settings = run["rows"], run["settings"]
    said = [
        f"{PurePath(row['model']).name} on {row['text']}: PPL {closing_cells(row)['PPL']},"
        f" {row['windows']} windows of {row['n_ctx']}"
        for row in rows
    ]
    sections = [
        Section(
            heading="Closing table",
            table=closing_table(rows),
            aside="± one standard error. Differences are paired token by token with the first model on the"
            " same tokens. Δp: change of the probability of the token that came.",
        )
    ]
    if drawn:
        sections.append(Section(heading="Along the text", pictures=_pictures(rows)))
    sections.append(Section(heading="By position in the window", table=_positions(rows)))
    return Page(
        command="ppl --only",
        verdict="measured",
        reasons=said[:MOST_LINES] or ["nothing was finished"],
        notes=run["notes"],
        subject=f"Kernel {settings['kernel']}, path {settings['path']}.",
        sections=sections,
        again=[run["again"]] if run.get("again") else [],
        facts=[*_models(rows), *flat(run["environment"])],
    )


def _models(rows: Sequence[OnlyRow]) -> list[tuple[str, str]]:
    files = {row["model"]: row["fingerprint"][:16] for row in rows}
    return [("model", f"{path} (fingerprint {mark})") for path, mark in files.items()]


def _positions(rows: Sequence[OnlyRow]) -> PageTable:
    texts = [
        (
            PurePath(row["model"]).name,
            row["text"],
            f"{part['n_kv_min']} to {part['n_kv_max']}",
            str(part["tokens"]),
            f"{figure(part['ppl'], '%.4f')} ± {figure(part['ppl_se'], '%.4f')}",
        )
        for row in rows
        for part in row["by_position"]
    ]
    return PageTable(("model", "text", "n_kv", "tokens", "PPL"), texts, ("model", "text"))


def _pictures(rows: Sequence[OnlyRow]) -> list[Picture]:
    """Perplexity window by window, and by the number of visible keys."""
    colours = (BASELINE, *CANDIDATES)
    names = [PurePath(row["model"]).stem for row in rows]
    windows: list[PerplexityLine] = [
        (name, range(1, len(row["by_window"]) + 1), row["by_window"], colour)
        for name, row, colour in zip(names, rows, colours, strict=False)
    ]
    positions: list[PerplexityLine] = [
        (
            name,
            [(p["n_kv_min"] + p["n_kv_max"]) / 2 for p in row["by_position"]],
            [p["ppl"] for p in row["by_position"]],
            colour,
        )
        for name, row, colour in zip(names, rows, colours, strict=False)
    ]
    made = []
    for kind, lines in (("by_window", windows), ("by_position", positions)):
        xlabel, caption = PERPLEXITY_CAPTIONS[kind]
        made.append(perplexity_lines(kind, lines, xlabel=xlabel, caption=caption))
    return [picture for picture in made if picture is not None]
