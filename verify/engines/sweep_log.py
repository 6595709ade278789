"""Logs of sweep-bench: Markdown tables or JSON lines, among whatever else a log holds; llama-bench's too.

    |    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |

A row says: with N_KV cached tokens, PP prompt tokens took T_PP seconds, and TG generated ones T_TG. Further
columns (`--sweep-memory` adds two) are passed over. A depth may have several rows: repeats.

A file may hold several logs. A second header begins one, JSON rows of other settings make one, and so do
rows of other PP and TG: none of these are repeats. Tables are also read without outer bars, as CSV, with
tabs, and behind the prefixes of time stamps and containers. A last row that is cut off is left out, and the
log says so.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from verify.engines.depth_tests import DepthTest, is_record, is_table, test_of_cells, test_of_record
from verify.engines.pasted_text import plain_text
from verify.machine.errors import UsageError
from verify.machine.files import read_input

COLUMNS = ("PP", "TG", "N_KV", "T_PP s", "T_TG s")
KEYS = ("pp", "tg", "n_kv", "t_pp", "t_tg")
# What a JSON row measures; its other keys are settings.
_JSON_MEASURED = {*KEYS, "speed_pp", "speed_tg", "rss_hwm_mib", "vram_delta_mib"}
_SEPARATORS = ("|", "\t", ",", ";")
_RULE = re.compile(r":?-+:?")
_LONGEST_HEADING = 60
_TIME_STAMP = re.compile(r"\W*\d+[.:]\d")


class SweepRow(NamedTuple):
    """One measurement; times in seconds, None where the log has none (its PP or TG is 0 then)."""

    pp: int
    tg: int
    n_kv: int
    t_pp: float | None
    t_tg: float | None


class SweepLog(NamedTuple):
    """Rows of one build and one kind of work, ordered by depth, repeats in the order of the file.

    notes: what was left out, sentences.
    """

    label: str
    path: Path
    rows: list[SweepRow]
    notes: tuple[str, ...] = ()

    @property
    def work(self) -> tuple[int, int]:
        """PP and TG of every row."""
        return self.rows[0].pp, self.rows[0].tg


class _Section(NamedTuple):
    """Rows under one heading, not yet told apart by their work."""

    heading: str
    rows: list[SweepRow]
    notes: list[str]


class _Table(NamedTuple):
    """A table that is being read."""

    separator: str  # of cells
    # Cells before the first column: an outer bar, a prefix.
    lead: int
    columns: list[str]  # in their order
    bench: bool  # whether it is one of llama-bench
    section: _Section  # that it stands in
    tests: list[DepthTest]  # what its lines are, where a line is a test


def read_logs(path: str | Path) -> list[SweepLog]:
    """Every log of a file. Raises UsageError naming the file and the line.

    That is where there is no row, a row that says nothing, or a table of another program.
    """
    path = Path(path)
    try:
        text = plain_text(read_input(path))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        objects = _whole_json(text) or _comma_separated(text)
        if objects is not None:
            numbered = ((f"{path}: row {i}", x) for i, x in enumerate(objects, 1))
            sections, seen = _json_sections(numbered), "no rows"
        else:
            sections, seen = _LogReader(path).read(text)
    except csv.Error as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    sections = [s for s in sections if s.rows]
    if not sections:
        expected = f"expected sweep-bench rows with the columns {', '.join(COLUMNS)}, or JSON lines"
        raise UsageError(f"{path}: {seen}; {expected}")
    return _told_apart(path, sections)


def _told_apart(path: Path, sections: Sequence[_Section]) -> list[SweepLog]:
    """A log a section and kind of work, each with a label of its own."""
    found: list[tuple[str, list[SweepRow], tuple[str, ...]]] = []
    for section in sections:
        works = sorted({(row.pp, row.tg) for row in section.rows})
        for pp, tg in works:
            rows = [row for row in section.rows if (row.pp, row.tg) == (pp, tg)]
            names = [section.heading] if section.heading else []
            if len(works) > 1:
                names.append(f"PP {pp} TG {tg}")
            # A note is of the table, and said once.
            notes = tuple(section.notes) if (pp, tg) == works[0] else ()
            found.append((", ".join(names), sorted(rows, key=lambda row: row.n_kv), notes))
    if len(found) == 1:
        return [SweepLog(path.stem, path, found[0][1], found[0][2])]
    names_used: list[str] = []
    for i, (name, _, _) in enumerate(found, 1):
        names_used.append(name if name and name not in names_used else f"{name} log {i}".strip())
    return [
        SweepLog(f"{path.stem} [{name}]", path, rows, notes)
        for name, (_, rows, notes) in zip(names_used, found, strict=True)
    ]


class _LogReader:
    """Reads a text line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table: _Table | None = None
        # A row with too few cells: the last of its table, or a mistake.
        self.cut: str | None = None
        # A JSON row that is none: the last, or a mistake.
        self.cut_json: str | None = None
        self.sections: list[_Section] = []
        self.objects: list[tuple[str, dict[str, Any]]] = []
        self.heading, self.other_table, self.headers = "", "", 0

    def read(self, text: str) -> tuple[list[_Section], str]:
        """The sections, and what was seen where there are none."""
        lines = text.splitlines()
        before: list[str] = []
        for number, line in enumerate(lines, 1):
            where = f"{self.path}, line {number}"
            found = self._object_in(line, where)
            if found is not None:
                self.objects.append((where, found))
                continue
            header = self._header(line, where)
            if header is not None:
                self._end_table()
                self.headers += 1
                self.table, self.heading, before = header, "", []
                self.sections.append(header.section)
                continue
            cells = [_cell(c) for c in line.split("|")] if "|" in line else []
            if sum(bool(_RULE.fullmatch(c)) for c in cells) >= 2:
                # A rule under a line that is not our header: another table begins.
                if len(before) == len(cells) and self._is_other(before):
                    self.other_table = self.other_table or ", ".join(c for c in before if c)
                    self._end_table()
                before = []
                continue
            if self.table is not None and self._row(self.table, line, where):
                before = []
                continue
            before = cells
            if cells and self.table is None:
                self.other_table = self.other_table or ", ".join(c for c in cells if c)
            if not cells and (said := _heading(line)):
                self.heading = said
        self._end_table()
        from_json = _json_sections(self.objects)
        if self.cut_json is not None:
            from_json[-1].notes.append("the last row is cut off, and left out")
        sections = self.sections + from_json
        if self.headers:
            return sections, "its table has no rows"
        return (
            sections,
            f"it has a table of {self.other_table[:80]}" if self.other_table else "it has no table",
        )

    def _object_in(self, line: str, where: str) -> dict[str, Any] | None:
        """The JSON row in a line, behind whatever prefix; None where there is none."""
        if not any(f'"{key}"' in line for key in ("n_kv", "avg_ns")) or "{" not in line:
            return None
        if self.cut_json is not None:
            raise UsageError(self.cut_json)
        try:
            found, _ = json.JSONDecoder().raw_decode(line[line.index("{") :])
        except (ValueError, RecursionError):
            self.cut_json = f"{where}: not JSON: the log is cut off"
            if not self.objects:
                raise UsageError(self.cut_json) from None
            return None
        return found if isinstance(found, dict) and ("n_kv" in found or is_record(found)) else None

    def _is_other(self, before: Sequence[str]) -> bool:
        return self.table is not None and not set(self.table.columns) <= set(before)

    def _header(self, line: str, where: str) -> _Table | None:
        """The table that a line is the header of."""
        for separator in _SEPARATORS:
            cells = [_cell(c) for c in _split(line, separator)]
            rule = next((i for i, c in enumerate(cells) if _RULE.fullmatch(c)), len(cells))
            # Header and rule pasted into one line.
            cells = cells[:rule]
            while cells and not cells[-1]:
                cells.pop()
            bench = is_table(cells)
            if "N_KV" not in cells and not bench:
                continue
            if not bench and ("B" in cells or "T s" in cells):
                raise UsageError(
                    f"{where}: a table of llama-batched-bench (B sequences at once, whose N_KV is a total),"
                    " expected sweep-bench, or llama-bench -d"
                )
            if not bench and separator != "|" and not set(COLUMNS) <= set(_last_words(cells)):
                # Prose and settings have commas too.
                continue
            missing = [] if bench else [name for name in COLUMNS if name not in _last_words(cells)]
            if missing:
                raise UsageError(
                    f"{where}: a table of {', '.join(c for c in cells if c)}: expected a column"
                    f" {missing[0]!r} as well"
                )
            words = cells if bench else _last_words(cells)
            lead = next(i for i, c in enumerate(words) if c and (bench or c in COLUMNS))
            return _Table(
                separator=separator,
                lead=lead,
                columns=words[lead:],
                bench=bench,
                section=_Section(self.heading, [], []),
                tests=[],
            )
        return None

    def _row(self, table: _Table, line: str, where: str) -> bool:
        """Whether the line belongs to the table; its row, if it has one, is kept."""
        if table.separator not in line:
            return False
        cells = [_cell(c) for c in _split(line, table.separator)]
        if not cells[-1]:
            cells.pop()
        if len(cells) <= table.lead:
            return False
        if not table.bench and table.lead == 0:
            # No outer bar: a prefix stands in the first cell.
            cells[0] = cells[0].rpartition(" ")[2]
        mine = cells[table.lead :]
        whole = len(mine) == len(table.columns)
        if not table.bench and not all(_is_number(c) for c in (mine[:1] if whole else mine[:-1] or mine)):
            return False
        if not whole:
            if table.bench and len(mine) < len(table.columns) - 2:
                return False
            self._refuse_cut()
            self.cut = f"{where}: a row of {len(mine)} columns, expected {len(table.columns)}"
            return True
        self._refuse_cut()
        if table.bench:
            try:
                test = test_of_cells(table.columns, mine)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where}: {error}") from None
            table.tests.extend([test] if test else [])
            return True
        table.section.rows.append(_row([mine[table.columns.index(n)] for n in COLUMNS], COLUMNS, where))
        return True

    def _refuse_cut(self) -> None:
        """A row with too few cells that others follow was not cut off by an end."""
        if self.cut is not None:
            raise UsageError(self.cut)

    def _end_table(self) -> None:
        if self.table is not None and self.cut is not None:
            self.table.section.notes.append(f"{self.cut.partition(': ')[2]}: cut off, and left out")
            if not self.table.section.rows and not self.table.tests:
                raise UsageError(f"{self.cut}: the log is cut off")
        if self.table is not None and self.table.tests:
            at = self.sections.index(self.table.section)
            self.sections[at : at + 1] = _depth_sections(self.table.tests, self.table.section.heading)
        self.table, self.cut = None, None


def _is_number(cell: str) -> bool:
    """Whether a cell begins as a number does: `1,000`, `1K` and `-nan` are refused later, and by name."""
    return cell[:1].isdigit() or cell.lstrip("+-").lower()[:3] in ("nan", "inf")


def _split(line: str, separator: str) -> list[str]:
    if separator == "," and '"' in line:
        return next(csv.reader([line]))
    return line.split(separator)


def _cell(text: str) -> str:
    """A cell without what Markdown puts around it; `T_PP (s)` as `T_PP s`."""
    text = text.strip().strip("*`").strip().replace("\\_", "_")
    return re.sub(r"\((s|t/s)\)", r"\1", text)


def _last_words(cells: Sequence[str]) -> list[str]:
    """Cells with what stands before a column's name taken off (a prefix, where there is no outer bar)."""
    return [next((n for n in COLUMNS if c.endswith(f" {n}")), c) for c in cells]


def _heading(line: str) -> str:
    """What a line calls what follows; empty where it is a log's own line."""
    said = re.sub(r"<[^>]*>|```\w*|^[#>\s]+", " ", line).strip(" *_`:#-\t")
    said = " ".join(said.split())
    noise = "=" in said or _TIME_STAMP.match(line) or not any(c.isalpha() for c in said)
    return "" if noise or len(said) > _LONGEST_HEADING else said


def _whole_json(text: str) -> list[dict[str, Any]] | None:
    """The objects of a text that is one JSON value; None where it is not."""
    if text.lstrip()[:1] not in ("[", "{") or ("\n" not in text.strip()[1:] and text.lstrip()[0] == "{"):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    listed = found if isinstance(found, list) else [found]
    return [x for x in listed if isinstance(x, dict)]


def _comma_separated(text: str) -> list[dict[str, Any]] | None:
    """Records of `llama-bench -o csv`; None where there is no such header."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if "avg_ns" in line and {"n_prompt", "n_gen", "avg_ns"} <= set(next(csv.reader([line]))):
            return [x for x in csv.DictReader(lines[i:]) if None not in x.values()]
    return None


def _json_sections(objects: Iterable[tuple[str, dict[str, Any]]]) -> list[_Section]:
    """A section a setting; objects that are no rows are passed over."""
    by_setting: dict[tuple[tuple[str, str], ...], list[SweepRow]] = {}
    tests: list[DepthTest] = []
    for where, found in objects:
        if is_record(found):
            try:
                test = test_of_record(found)
            except ValueError as error:
                raise UsageError(f"{where}: {error}") from None
            tests.extend([test] if test else [])
            continue
        if "n_kv" not in found:
            continue
        if "pl" in found:
            raise UsageError(
                f"{where}: a row of llama-batched-bench (pl sequences at once), expected sweep-bench"
            )
        for key in KEYS:
            if key not in found:
                raise UsageError(f"{where}: has no {key!r}, expected {', '.join(KEYS)}")
        setting = tuple(sorted((k, str(v)) for k, v in found.items() if k not in _JSON_MEASURED))
        by_setting.setdefault(setting, []).append(_row([found[key] for key in KEYS], KEYS, where))
    names = _what_differs(list(by_setting))
    sections = [_Section(name, rows, []) for name, rows in zip(names, by_setting.values(), strict=True)]
    return sections + (_depth_sections(tests, "") if tests else [])


def _depth_sections(tests: Sequence[DepthTest], heading: str) -> list[_Section]:
    """A section a setting of llama-bench; where it has several sizes of one kind, one a size."""
    by_setting: dict[tuple[tuple[str, str], ...], list[DepthTest]] = {}
    for test in tests:
        by_setting.setdefault(test.setting, []).append(test)
    sections = []
    for name, mine in zip(_what_differs(list(by_setting)), by_setting.values(), strict=True):
        sizes = {kind: sorted({t.tokens for t in mine if t.kind == kind}) for kind in ("pp", "tg")}
        rows: list[SweepRow] = []
        if all(len(s) <= 1 for s in sizes.values()):
            pp, tg = (s[0] if s else 0 for s in sizes.values())
            at: dict[str, dict[int, list[float]]] = {"pp": {}, "tg": {}}
            for t in mine:
                at[t.kind].setdefault(t.depth, []).append(t.seconds)
            for depth in sorted(at["pp"].keys() | at["tg"].keys()):
                prompt, generated = at["pp"].get(depth, []), at["tg"].get(depth, [])
                for i in range(max(len(prompt), len(generated))):
                    times = [x[i] if i < len(x) else None for x in (prompt, generated)]
                    rows.append(SweepRow(pp, tg, depth, times[0], times[1]))
        else:
            for t in mine:
                prompt_test = t.kind == "pp"
                work = (t.tokens, 0) if prompt_test else (0, t.tokens)
                rows.append(
                    SweepRow(
                        *work, t.depth, t.seconds if prompt_test else None, None if prompt_test else t.seconds
                    )
                )
        sections.append(_Section(", ".join(x for x in (heading, name) if x), rows, []))
    return sections


def _what_differs(settings: Sequence[tuple[tuple[str, str], ...]]) -> list[str]:
    """A name for each of several settings: the entries that are not the same in all."""
    if len(settings) < 2:
        return [""] * len(settings)
    tables = [dict(s) for s in settings]
    keys = [k for k in dict.fromkeys(k for t in tables for k in t) if len({t.get(k) for t in tables}) > 1]
    return [" ".join(f"{k} {t.get(k, '-')}" for k in keys)[:_LONGEST_HEADING] for t in tables]


def _row(values: Sequence[Any], names: tuple[str, ...], where: str) -> SweepRow:
    numbers: list[float] = []
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or number < 0 or (i < 3 and number != int(number)):
            raise UsageError(f"{where}: {name} is {str(value)[:20]!r}, expected a number from 0")
        numbers.append(number)
    pp, tg, n_kv = (int(x) for x in numbers[:3])
    for name, tokens, time in ((names[3], pp, numbers[3]), (names[4], tg, numbers[4])):
        if tokens and not time:
            raise UsageError(f"{where}: {name} is 0, expected a time")
    if not pp and not tg:
        raise UsageError(f"{where}: {names[0]} and {names[1]} are 0, expected tokens in one of them")
    return SweepRow(pp, tg, n_kv, numbers[3] if pp else None, numbers[4] if tg else None)
