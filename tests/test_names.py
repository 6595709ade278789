"""Names: a class has one of its own, and a long record is made and read by names."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("verify", "kernels", "model", "data")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
CALLERS = [*MODULES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]
# From so many fields on, one number in another's place is a wrong figure and no type error.
LONG = 6


def classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]


def fields_of(node: ast.ClassDef) -> list[ast.AnnAssign]:
    """The fields of a dataclass or named tuple; none of another class."""
    decorators, bases = (" ".join(map(ast.unparse, x)) for x in (node.decorator_list, node.bases))
    if "dataclass" not in decorators and "NamedTuple" not in bases:
        return []
    return [
        line for line in node.body if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line)
    ]


def test_a_class_has_a_name_of_its_own() -> None:
    places = defaultdict(list)
    for path in MODULES:
        for node in classes(path):
            places[node.name].append(str(path.relative_to(ROOT)))
    assert len(places) > 300
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@cache
def long_records() -> frozenset[str]:
    """Read when it is asked for: every process that shares the tests imports this module."""
    return frozenset(node.name for path in MODULES for node in classes(path) if len(fields_of(node)) >= LONG)


def by_position(path: Path) -> list[str]:
    """Calls that make a long record, with some of its fields by position."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        spread = any(isinstance(argument, ast.Starred) for argument in node.args)
        if name in long_records() and node.args and (spread or len(node.args) + len(node.keywords) >= LONG):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    return found


def test_a_long_record_is_made_by_keyword() -> None:
    assert [call for path in CALLERS for call in by_position(path)] == []


def is_commented(field: ast.AnnAssign, lines: list[str]) -> bool:
    """Whether a field has a comment in its own line, or in the one above."""
    own = " ".join(lines[field.lineno - 1 : field.end_lineno])
    return "#" in own or lines[field.lineno - 2].strip().startswith("#")


def test_each_field_of_a_long_record_has_a_comment() -> None:
    without = set()
    for path in MODULES:
        lines = path.read_text().split("\n")
        for node in classes(path):
            fields = fields_of(node)
            if len(fields) >= LONG and not all(is_commented(field, lines) for field in fields):
                without.add(node.name)
    assert without == set()
