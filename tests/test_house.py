"""The house: four packages, each importing only from those below it, all of them in the distribution."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"data": 1, "kernels": 1, "model": 2, "verify": 3}
MODULES = sorted(path for package in FLOORS for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of our packages that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & FLOORS.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for other in imported(path) - {own}:
        assert FLOORS[other] < FLOORS[own], f"{path.relative_to(ROOT)} imports {other}"


@pytest.mark.parametrize("name", ["worker", "python_servant", "ggml_servant"])
def test_the_worker_of_foreign_kernels_imports_nothing_of_ours(name: str) -> None:
    assert not imported(ROOT / f"kernels/foreign/{name}.py")


def test_every_package_is_listed_explicitly() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {str(p.parent.relative_to(ROOT)).replace("/", ".") for p in MODULES if p.name == "__init__.py"}
    assert set(listed) == there


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
