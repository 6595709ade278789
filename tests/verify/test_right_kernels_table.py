"""The table of right kernels (docs/right-kernels.md): today's rules say of its rows what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support import right_kernels
from verify.diff.inputs import DiffSettings, all_inputs
from verify.diff.run import run_diff
from verify.diff.stored_strata import unpacked
from verify.kernels.foreign.function_kernel import FunctionKernel
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel
from verify.machine.stages import StageClock

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/right-kernels.json"
Rows = dict[tuple[str, str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/right_kernels.py, which made the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import right_kernels as found

        sys.modules.pop("right_kernels", None)
        return found


@pytest.fixture(scope="module")
def rows() -> Rows:
    stored = json.loads(RESULTS.read_text())
    return {(row["name"], row["command"], row["device"]): row for row in stored}


def test_no_right_kernel_is_broken_but_for_its_own_limit(script: ModuleType, rows: Rows) -> None:
    assert len(script.KERNELS) >= 30
    for kernel in script.KERNELS:
        for command in script.COMMANDS:
            row = rows.get((kernel.name, command, "cpu"))
            if row is None:
                # Not measured yet, which `verify diff` is of all.
                assert command != "diff", kernel.name
                continue
            assert not script.false_alarm(row, {kernel.name: kernel.limit}), row
            # Only what needs a GPU, or is not taken, may be left out.
            assert row["verdict"] != "refused" or not row["spec"].startswith("py:"), row


def test_of_built_engines_too_one_alone_is_broken(script: ModuleType, rows: Rows) -> None:
    """ik's for a CPU, whose windows that hide the first tiles give 2.7e36 for 0.18 (the page says how)."""
    limits = {kernel.name: kernel.limit for kernel in script.KERNELS}
    alarms = {key for key, row in rows.items() if script.false_alarm(row, limits)}
    assert alarms == {("ik-cpu", "diff", "cpu")}


def test_runs_of_another_machine_stand_in_the_place_of_older_ones(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and what they were judged by; not those that the machine refused, or did not end."""
    stored = json.loads(RESULTS.read_text())
    pair = next(pair for name, pair in unpacked(script.strata_file(RESULTS)) if name == "textbook cpu")

    def of(verdict: str, command: str, name: str = "engine") -> dict[str, Any]:
        base = {"name": name, "command": command, "device": "cuda", "reasons": [], "commit": verdict}
        return {**base, "verdict": verdict}

    ours, theirs, page = tmp_path / "ours.json", tmp_path / "theirs.json", tmp_path / "page.md"
    old = [
        of("broken", "diff"),
        of("round-off", "gen"),
        of("degraded", "ppl"),
        of("improved", "diff", "left"),
    ]
    ours.write_text(json.dumps([*stored[:2], *old]))
    kept = [("engine cuda", pair._replace(verdict="broken")), ("left cuda", pair)]
    script.strata_file(ours).write_bytes(script.packed(kept))
    theirs.write_text(json.dumps([of("improved", "diff"), of("refused", "gen"), of("none", "ppl")]))
    script.strata_file(theirs).write_bytes(script.packed([("engine cuda", pair)]))
    page.write_text("before\n<!-- measured: begin -->\n<!-- measured: end -->\nafter\n")
    asked = ["--out", str(ours), "--take", str(theirs), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["right_kernels.py", *asked])
    assert script.main() == 0
    now = {script.key_of(row): row for row in json.loads(ours.read_text())}
    assert [now["engine", command, "cuda"]["verdict"] for command in ("diff", "gen", "ppl")] == [
        "improved", "round-off", "degraded",
    ]  # fmt: skip
    assert all(script.key_of(row) in now for row in stored[:2]) and len(now) == 6
    judged = dict(unpacked(script.strata_file(ours)))
    assert judged["engine cuda"].verdict == pair.verdict and "left cuda" in judged
    assert "| `engine` | a built engine | degraded | improved | - | round-off |" in page.read_text()
    # Without what it was judged by, what was there is of another run.
    script.strata_file(theirs).unlink()
    assert script.main() == 0
    assert set(dict(unpacked(script.strata_file(ours)))) == {"left cuda"}


def test_todays_rules_say_of_the_rows_what_the_table_says(script: ModuleType, rows: Rows) -> None:
    """A rule that changes a verdict shows here: the table is then made anew, or the rule is wrong."""
    stored = dict(unpacked(script.strata_file(RESULTS)))
    diffs = {key: row for key, row in rows.items() if key[1] == "diff" and row["verdict"] != "refused"}
    said = {script.pair_name(name, device): row["verdict"] for (name, _, device), row in diffs.items()}
    # All of a CPU; of a GPU those that were run since rows are kept.
    on_cpu = {script.pair_name(name, device) for name, _, device in diffs if device == "cpu"}
    assert on_cpu <= set(stored) <= set(said)
    for name, pair in stored.items():
        now = pair.judge()
        assert now.verdict == said[name], (name, now.reasons)


def test_the_page_is_of_these_rows(script: ModuleType, rows: Rows) -> None:
    page = (ROOT / "docs/right-kernels.md").read_text()
    for device in ("cpu", "cuda"):
        assert script.table(list(rows.values()), device) in page


@pytest.mark.parametrize(
    ("name", "due"), [("textbook_f16", "round-off"), ("float32_p", "improved"), ("bf16_p", "degraded")]
)
def test_three_of_them_run(name: str, due: str) -> None:
    def build(spec: str) -> Kernel:
        return (
            FunctionKernel(getattr(right_kernels, name), spec=spec) if spec == "py:it" else build_kernel(spec)
        )

    settings = DiffSettings(
        shapes=("4/2x64",),
        n_kvs=(203,),
        families=("probes", "gaussian", "rising", "needles"),
        baseline="eager",
        candidates=("py:it",),
        device="cpu",
    )
    cpu = torch.device("cpu")
    clock = StageClock(cpu)
    outcome = run_diff(settings, cpu, all_inputs(settings, cpu, clock), clock, build=build)
    assert outcome.verdict == due, outcome.candidates[0].reasons
