"""The JSON that is printed is as the schemas say that are shipped with it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import verify
from support.cli import verify as run
from support.schemas import violations

KERNELS = Path(__file__).parents[1] / "support/user_kernels.py"
NAMES = ("check", "diff", "judge", "props")


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files("verify.schemas").joinpath(f"{name}.json").read_text())
    return found


def test_there_are_these() -> None:
    there = {file.name for file in files("verify.schemas").iterdir() if file.name.endswith(".json")}
    assert there == {f"{name}.json" for name in NAMES}


@pytest.mark.parametrize("function", ["good", "last_key_dropped"])
def test_outputs_are_as_they_say(function: str, tmp_path: Path) -> None:
    spec = f"py:{KERNELS}::{function}"
    outputs = {
        "diff": run("diff", "--shape", "2/1x32", "--n-kv", "33", "--inputs", "probes,gaussian", "--json",
                    "--candidate", spec, "--device", "cpu", "--out", str(tmp_path / "run")).stdout,
        "props": run("props", spec, "--law", "within-budget", "--law", "caches", "--examples", "3", "--json",
                     "--device", "cpu").stdout,
        "check": verify.check_attention(spec, n_kv=33, paths="decode", families=["gaussian"]).to_json(),
    }  # fmt: skip
    for name, text in outputs.items():
        assert violations(schema(name), json.loads(text)) == [], name


def test_a_judgement_is_as_its_schema_says() -> None:
    planted = KERNELS.with_name("cheats") / "planted.py"
    done = run("judge", f"{planted}::zeros", "--n-kv", "33", "--examples", "1", "--json", "--device", "cpu")
    found = json.loads(done.stdout)
    assert found["verdict"] == "cheats" and violations(schema("judge"), found) == []


def test_what_is_not_as_it_says_is_found() -> None:
    assert violations(schema("props"), {"schema": "1", "laws": [{"state": "fine"}]})[:2] == [
        "$: command is missing",
        "$: spec is missing",
    ]
    assert any("'fine' is none of" in x for x in violations(schema("props"), {"laws": [{"state": "fine"}]}))
