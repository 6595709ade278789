"""Logs of sweep-bench: the Markdown table or the JSON lines, among whatever else a log holds.

    |    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |

A row says: with N_KV cached tokens, PP prompt tokens took T_PP seconds, and TG generated ones T_TG. Further
columns (`--sweep-memory` adds two) are passed over. A depth may have several rows: repeats.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from verify.machine.errors import UsageError

COLUMNS = ("PP", "TG", "N_KV", "T_PP s", "T_TG s")
KEYS = ("pp", "tg", "n_kv", "t_pp", "t_tg")


class Row(NamedTuple):
    """One measurement; times in seconds."""

    pp: int
    tg: int
    n_kv: int
    t_pp: float
    t_tg: float


class SweepLog(NamedTuple):
    """The rows of one file, ordered by depth, repeats in the order of the file."""

    label: str
    path: Path
    rows: list[Row]


def read_sweep(path: str | Path) -> SweepLog:
    """Raises UsageError naming the file and the line for a log without rows or with rows that say nothing."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    rows: list[Row] = []
    order: list[int] | None = None
    width, other_table = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}, line {number}"
        stripped = line.strip()
        if stripped.startswith("{"):
            found = _json_row(stripped, where)
            if found is not None:
                rows.append(found)
            continue
        # A log may put a time or a level before the table.
        start = line.find("|")
        cells = [c.strip() for c in line[start:].strip().strip("|").split("|")] if start >= 0 else []
        if len(cells) < 2:
            continue
        if "N_KV" in cells:
            missing = [name for name in COLUMNS if name not in cells]
            if missing:
                raise UsageError(
                    f"{where}: a table of {', '.join(cells)}: expected a column {missing[0]!r} as well"
                )
            order, width = [cells.index(name) for name in COLUMNS], len(cells)
        elif order is None:
            other_table = other_table or ", ".join(cells)
        elif not set("".join(cells)) <= set("-: ") and cells[0][:1].isdigit():
            if len(cells) != width:
                raise UsageError(
                    f"{where}: a row of {len(cells)} columns, expected {width}: the log is cut off"
                )
            rows.append(_row([cells[i] for i in order], COLUMNS, where))
    if not rows:
        said = f"it has a table of {other_table[:80]}" if other_table else "it has no table"
        expected = f"expected sweep-bench rows with the columns {', '.join(COLUMNS)}, or JSON lines"
        raise UsageError(f"{path}: {said if order is None else 'its table has no rows'}; {expected}")
    return SweepLog(path.stem, path, sorted(rows, key=lambda row: row.n_kv))


def _json_row(line: str, where: str) -> Row | None:
    """The row of a JSON line; None for an object that is no row."""
    try:
        found: dict[str, Any] = json.loads(line)
    except ValueError:
        if '"n_kv"' in line:
            raise UsageError(f"{where}: not JSON: the log is cut off") from None
        return None
    if "n_kv" not in found:
        return None
    for key in KEYS:
        if key not in found:
            raise UsageError(f"{where}: has no {key!r}, expected {', '.join(KEYS)}")
    return _row([found[key] for key in KEYS], KEYS, where)


def _row(values: list[Any], names: tuple[str, ...], where: str) -> Row:
    numbers: list[float] = []
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or number < 0 or (i < 3 and number != int(number)):
            raise UsageError(f"{where}: {name} is {str(value)[:20]!r}, expected a number from 0")
        numbers.append(number)
    row = Row(int(numbers[0]), int(numbers[1]), int(numbers[2]), numbers[3], numbers[4])
    if not row.t_tg or not row.t_pp:
        raise UsageError(f"{where}: {names[4] if row.t_pp else names[3]} is 0, expected a time")
    return row
