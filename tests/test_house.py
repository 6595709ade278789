"""The house: one package, its floors importing only from those below, all of it in the distribution."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each folder's floor: what stands on one imports only from lower ones, and from itself.
FLOORS = {"data": 1, "kernels": 1, "model": 2, "verify": 3}
# Rooms of the top floor: each imports only from those after it, and none from beside it.
ROOMS = (
    ("commands", "pytest_plugin"), ("distrust",), ("at_hand",), ("check", "tolerances"), ("reports",),
    ("selftest", "bench", "rejudge"), ("gen", "explain"), ("ppl",), ("families",),
    ("reference", "diff", "engines", "laws"),
    ("given", "call_options", "stated", "planned", "schemas"),
    ("arms",), ("identify",), ("judge",), ("machine",),
)  # fmt: skip
ENTRANCES = {"__init__", "__main__", "checkout"}
MODULES = sorted(path for package in FLOORS for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor_of(name: str) -> str | None:
    """The folder that a dotted name of ours lives in; None for what is not ours."""
    first, *rest = name.split(".")
    if first != "verify":
        return None
    return rest[0] if rest and rest[0] in FLOORS else "verify"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for other in {floor_of(name) for name in imported(path)} - {own, None}:
        assert FLOORS[other] < FLOORS[own], f"{path.relative_to(ROOT)} imports {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_goes_by_a_name_that_others_have(path: Path) -> None:
    """`kernels`, `model` and `data` are also names of other people's packages and files."""
    assert not {name.split(".")[0] for name in imported(path)} & {"kernels", "model", "data"}


FOREIGN = ROOT / "kernels/foreign"
IN_THE_WORKER = [
    *(FOREIGN / f"{name}.py" for name in ("worker", "python_servant", "cheat_servant", "merge_servant")),
    *(FOREIGN / f"{name}.py" for name in ("ggml_servant", "bench_call")),
    *sorted(path for folder in ("forms", "cheats") for path in (FOREIGN / folder).glob("*.py")),
]


@pytest.mark.parametrize("file", IN_THE_WORKER, ids=lambda p: str(p.relative_to(FOREIGN)))
def test_the_worker_of_foreign_kernels_imports_nothing_of_ours(file: Path) -> None:
    names = imported(file)
    assert names and not [other for other in names if floor_of(other)]


def test_every_package_is_listed_explicitly() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent.relative_to(ROOT).parts for p in MODULES if p.name == "__init__.py"}
    there = {".".join(parts if parts[0] == "verify" else ("verify", *parts)) for parts in folders}
    # A folder of templates is none of Python, and is listed for setuptools all the same.
    templates = {"verify.reports.templates"}
    assert set(listed) == there | templates


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def dotted(path: Path) -> str:
    """The name that a module of ours is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "verify" else ("verify", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", [p for p in MODULES if ">>> " in p.read_text()], ids=dotted)
def test_examples_in_docstrings_are_true(path: Path) -> None:
    # By name: by path the same module would be loaded a second time, with other classes.
    tried = doctest.testmod(importlib.import_module(dotted(path)))
    assert tried.attempted and not tried.failed


def test_no_folder_that_we_make_has_the_name_of_a_module() -> None:
    """ruff sorts `import runs` as ours as soon as a folder of that name is there."""
    made = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split() if line.endswith("/")}
    assert {"build", "dist", "runs"} <= made
    ours = [path for folder in (*FLOORS, "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    imports = {name.split(".")[0] for path in ours for name in imported(path)}
    assert not made & ({path.stem for path in ours} | {path.parent.name for path in ours} | imports)


def test_rooms_of_the_top_floor_import_downwards() -> None:
    storey = {room: number for number, rooms in enumerate(ROOMS) for room in rooms}
    upwards = []
    for path in (ROOT / "verify").rglob("*.py"):
        own = path.relative_to(ROOT / "verify").parts[0].removesuffix(".py")
        assert own in storey or own in ENTRANCES, f"{path}: a room that {ROOMS} does not have"
        if own in storey:
            others = {name.split(".")[1] for name in imported(path) if name.startswith("verify.")}
            upwards += [f"{path.name} -> {x}" for x in others - {own} if storey.get(x, 99) <= storey[own]]
    assert upwards == []


def test_every_path_that_the_page_of_the_house_names_is_there() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"\b(?:verify|kernels|model|data|docs|tests)/[\w./-]*\w/?", page))
    assert len(named) > 60
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    # And every room is on it.
    rooms = {p.parent.relative_to(ROOT) for p in MODULES if p.name == "__init__.py"}
    shallow = {f"{room}/" for room in rooms if len(room.parts) <= 2}
    assert {room for room in shallow if room not in page} == set()


def test_no_test_is_called_by_an_address(request: pytest.FixtureRequest) -> None:
    """Processes that share the tests would collect different ones."""
    assert not [item.nodeid for item in request.session.items if re.search(r" at 0x[0-9a-f]", item.nodeid)]
