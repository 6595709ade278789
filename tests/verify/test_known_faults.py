"""Every known fault, as the candidate of `verify ppl` on a model: none passes for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support import tiny_model
from support.ppl_runs import Tiny, run
from verify.kernels.faults import FAULTS, Fault
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.kernel import Kernel
from verify.ppl import experiment

# Detected by two runs that differ: the run is void if it is the baseline, and luck if it is not.
NOT_REPEATABLE = {"race"}
# Right here: one is a right kernel that runs another plan, which the trace shows; the other's weights
# overflow only where logits are large.
RIGHT_HERE = {"never ran", "no common maximum"}
# Of each kind one in the fast tests: one row in a hundred, all rows a little, rows that come last.
FAST = {"lone key dropped", "wrong by 2 %", "late maximum"}


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """12 query heads over 2 KV heads: r = 6, which faults of head groups need."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_model, "HEADS", 12)
        folder = tmp_path_factory.mktemp("six")
        numbers = {"attention__key_length": 16, "attention__value_length": 16}
        model = tiny_model.write_tiny_model(folder / "six.gguf", **numbers)
        return Tiny(model, tiny_model.write_text(folder / "text.txt"))


def judged(six: Tiny, out: Path, fault: Fault, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run with the fault as the candidate, and the correct kernel that it was made from as the baseline."""

    def clean() -> Kernel:
        options: dict[str, Any] = {}
        faulty = fault.build()
        assert isinstance(faulty, TileKernel)
        heads = faulty.plan.heads
        options["heads"] = heads if isinstance(heads, tuple) else None
        options |= {"kv": faulty.plan.kv.value, "block": faulty.plan.block, "p": faulty.p, "acc": faulty.acc}
        return TileKernel("clean", **options)

    built = {"eager": clean, "eager:block=16": fault.build}
    patch.setattr(experiment, "build_shared_kernel", lambda spec, gpus: built[spec]())
    # Three tiles, so that three parts are there to be merged.
    more = ("-c", "160", "--chunks", "2", "--baseline", "eager", "--candidate", "eager:block=16")
    _, report = run(six, out, *more)
    assert {line["kernel"][:5] for line in report["coverage"]} == {"tile["}
    return report


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(f, id=f.name, marks=() if f.name in FAST else pytest.mark.slow)
        for f in FAULTS
        if not f.needs
    ],
)
def test_no_fault_that_changes_this_path_passes(
    six: Tiny, tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault.name in NOT_REPEATABLE:
        pytest.skip("gives other bits each time")
    report = judged(six, tmp_path / "run", fault, monkeypatch)
    (pair,) = report["pairs"]
    if pair["bitwise_equal"]:
        pytest.skip("changes nothing on this path")
    due = ("broken", "inconclusive") if fault.name in RIGHT_HERE else ("broken",)
    assert report["verdict"] in due, report["reasons"]
