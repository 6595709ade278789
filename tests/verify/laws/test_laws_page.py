"""docs/laws.md is what benchmarks/laws_table.py makes of the laws of today and the stored runs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from verify.laws import LAWS

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/laws.md"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/laws_table.py, which writes the page."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("laws_table")


def test_the_page_has_every_law_as_it_is_today(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "laws.md"
    again.write_text(PAGE.read_text())
    monkeypatch.setattr(script, "PAGE", again)
    script.write_page()
    assert again.read_text() == PAGE.read_text(), "run python benchmarks/laws_table.py"
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    # Once in the table of kernels, once among the statements.
    assert [rows.count(name) for name in LAWS] == [2] * len(LAWS)


def test_our_own_kernel_was_asked_every_law() -> None:
    stored: list[dict[str, Any]] = json.loads((ROOT / "benchmarks/results/laws-cpu.json").read_text())
    (eager,) = [run for run in stored if run["shown"] == "eager"]
    assert {law["name"]: law["state"] for law in eager["laws"]} == dict.fromkeys(LAWS, "holds")


def test_a_run_takes_the_place_of_the_one_before(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "laws-cpu.json"
    stored.write_text(json.dumps([{"shown": "a", "laws": 1}, {"shown": "b", "laws": 2}]))
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "props", lambda *asked: {"laws": asked})
    monkeypatch.setattr(script, "write_page", lambda: None)
    monkeypatch.setattr("sys.argv", ["laws_table.py", "a==eager", "c", "--examples", "3"])
    script.main()
    assert json.loads(stored.read_text()) == [
        {"shown": "a", "laws": ["eager", "cpu", 3]},
        {"shown": "b", "laws": 2},
        {"shown": "c", "laws": ["c", "cpu", 3]},
    ]
