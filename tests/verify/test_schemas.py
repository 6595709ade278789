"""The JSON that is printed is as the schemas say that are shipped with it.

`support.cli.verify` holds every output that any test asks of a command with --json against its schema; here
are those that no other test asks for, and the library's own.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import verify
from support.cli import verify as run
from support.schemas import assert_as_told, schema_of, untold, violations
from verify.commands import COMMANDS, load
from verify.machine.jsontext import to_json_text
from verify.selftest import run_selftest

KERNELS = Path(__file__).parents[1] / "support/user_kernels.py"


def test_every_command_that_prints_json_has_one_and_so_has_a_report() -> None:
    there = {file.name for file in files("verify.schemas").iterdir() if file.name.endswith(".json")}
    printing = [name for name in COMMANDS if any("--json" in each.opts for each in load(name).params)]
    assert len(printing) >= 17 and there == {f"{name}.json" for name in (*printing, "check", "ppl-only")}


@pytest.mark.parametrize("command", ["doctor", "list"])
def test_what_is_installed(command: str) -> None:
    """Held against its schema by `run`."""
    found = json.loads(run(command, "--json").stdout)
    kernels = {kernel["name"] for kernel in found["kernels"]}
    assert found["command"] == command and {"eager", "flash", "exact"} <= kernels


def test_plans_times_and_a_mutation_score() -> None:
    run("plan", "--shape", "glm-4.5-air", "--n-kv", "512,8192", "--json")
    run("bench", "--device", "cpu", "--shape", "2/1x16", "--n-kv", "64", "eager", "exact", "--json")
    found = run_selftest(1, only=lambda name: name == "last key dropped")
    assert_as_told("selftest", to_json_text(found.to_json()))


def test_what_could_be_read_off_a_kernel() -> None:
    done = run("identify", "eager:block=32", "--n-kv", "64", "--n-q", "1", "--seconds", "5", "--json")
    (regime,) = json.loads(done.stdout)["regimes"]
    assert regime["identifiable"]


@pytest.mark.parametrize("function", ["good", "last_key_dropped"])
def test_outputs_are_as_they_say(function: str, tmp_path: Path) -> None:
    spec = f"py:{KERNELS}::{function}"
    run("diff", "--shape", "2/1x32", "--n-kv", "33", "--inputs", "probes,gaussian", "--json",
        "--candidate", spec, "--device", "cpu", "--out", str(tmp_path / "run"))  # fmt: skip
    run("props", spec, "--law", "within-budget", "--law", "caches", "--examples", "3", "--json",
        "--device", "cpu")  # fmt: skip
    report = verify.check_attention(spec, n_kv=33, paths="decode", families=["gaussian"])
    assert_as_told("check", report.to_json())
    assert_as_told("diff", to_json_text(report.outcomes["decode"].run))


def test_a_judgement_is_as_its_schema_says() -> None:
    planted = KERNELS.with_name("cheats") / "planted.py"
    done = run("judge", f"{planted}::zeros", "--n-kv", "33", "--examples", "1", "--json", "--device", "cpu")
    found = json.loads(done.stdout)
    assert found["verdict"] == "cheats"


def test_what_is_not_as_it_says_is_found() -> None:
    props, tolerance = schema_of("props"), schema_of("tolerance")
    assert violations(props, {"schema": "1", "laws": [{"state": "fine"}]})[:2] == [
        "$: command is missing",
        "$: spec is missing",
    ]
    assert any("'fine' is none of" in x for x in violations(props, {"laws": [{"state": "fine"}]}))
    families: Any = [{"family": "gaussian", "dropped": {"vLLM": "no"}}]
    assert any("'no' is no boolean" in x for x in violations(tolerance, {"families": families}))
    assert untold(tolerance, {"families": [{"famly": 1}], "mood": 2}) == ["$.families[0].famly", "$.mood"]
