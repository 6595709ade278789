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


def test_todays_rules_say_of_the_rows_what_the_table_says(script: ModuleType, rows: Rows) -> None:
    """A rule that changes a verdict shows here: the table is then made anew, or the rule is wrong."""
    stored = dict(unpacked(script.strata_file(RESULTS)))
    said = {key: row["verdict"] for key, row in rows.items() if key[1:] == ("diff", "cpu")}
    kept = {f"{name} {device}" for (name, _, device), verdict in said.items() if verdict != "refused"}
    assert kept == set(stored)
    for (name, _, device), verdict in said.items():
        if verdict != "refused":
            now = stored[f"{name} {device}"].judge()
            assert now.verdict == verdict, (name, now.reasons)


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
