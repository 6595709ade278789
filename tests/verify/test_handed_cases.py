"""`benchmarks/handed_cases.py`: its table is whole, and what stands in no list is seen."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = """
import torch

def make(name, body):
    globals()[name] = body

def attend(q, k, v, *, kv_len, scale):
    return q

make("made", attend)

def merge(v_a, s_a, v_b, s_b):
    return v_a, s_a

def logits(q, k, kv_len, scale):
    return q

def _hidden(q, k, v, *, kv_len, scale):
    return q
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import handed_cases

        return handed_cases


@pytest.fixture(scope="module")
def table(script: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(script.TABLE.read_text())
    return found


def test_every_case_has_settings_verdicts_and_words(script: ModuleType, table: dict[str, Any]) -> None:
    cases = script.cases_of(table)
    assert len(cases) > 100 and len({case.key for case in cases}) == len(cases)
    assert {case.asked for case in cases} == set(table["settings"])
    assert all(case.due and case.why for case in cases)


def test_what_stands_in_no_list_and_what_is_gone_is_seen(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "some.py").write_text(KERNELS)
    assert script.functions_of(tmp_path / "some.py") == {"attend", "made", "merge"}
    lines = [["attend,acc=f32", "right", "diff", "right"], ["lost", "wrong", "diff", "gone"]]
    small = {"kinds": {"right": ["round-off"], "wrong": ["broken"]}, "files": {"some.py": lines}}
    cases = script.cases_of(small)
    assert cases[0].stated == ",acc=f32" and cases[0].due == ("round-off",)
    said = script.not_listed(tmp_path, cases, {"merge": "a helper"})
    assert said == ["some.py::made stands in no list", "some.py::lost is not there"]


@pytest.mark.slow
def test_a_verdict_that_is_not_due_is_told(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs of `verify` on a file: a law that holds, and one that does not."""
    support = ROOT / "tests/support"
    (tmp_path / "some.py").write_text((support / "user_kernels.py").read_text())
    names = sorted(script.functions_of(tmp_path / "some.py"))
    first = ["props", "--law", "first-call", "--examples", "2", "--seed", "1"]
    small = {
        "kinds": {"right": ["holds"]},
        "settings": {"first": first},
        "no_kernels": {name: "not asked" for name in names if name not in ("good", "first_call_unfilled")},
        "files": {"some.py": [["good", "right", "first", ""], ["first_call_unfilled", "right", "first", ""]]},
    }
    (tmp_path / "table.json").write_text(json.dumps(small))
    monkeypatch.setattr(script, "TABLE", tmp_path / "table.json")
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["handed_cases.py", str(tmp_path), "--out", str(out)])
    assert script.main() == 1
    said = capsys.readouterr().out
    assert "2 runs, 1 judged otherwise than is due" in said
    stored = json.loads(out.read_text())
    assert [row["verdict"] for row in stored.values()] == ["holds", "broken"]
    # What the file holds is not run again.
    before = out.stat().st_mtime_ns
    assert script.main() == 1 and out.stat().st_mtime_ns == before
