"""`verify diff` finds each fault of how calls are made, in the inputs that it is asked for by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from verify.diff import run as diff
from verify.diff.inputs import DiffSettings, all_inputs
from verify.diff.results import CandidateResult
from verify.kernels.faults import FAULTS, Fault
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel
from verify.machine.stages import StageClock

OF_CALLS = [fault for fault in FAULTS if fault.families]


def outcome(fault: Fault, build: Callable[[str], Kernel]) -> CandidateResult:
    # There V lies in K.
    shape = "glm-4.7-flash" if "v_in_k" in fault.sizes else "4/2x32"
    settings = DiffSettings(
        shapes=(shape,),
        n_kvs=(144,),
        families=fault.families,
        baseline="eager",
        candidates=("eager:kv=2",),
        device="cpu",
        path=fault.paths[0],
        rows=4,
        sequences=2 if "fewer" in fault.sizes else 1,
    )
    device = torch.device("cpu")
    clock = StageClock(device)
    inputs = all_inputs(settings, device, clock)
    return diff.run_diff(settings, device, inputs, clock, build=build).candidates[0]


@pytest.mark.parametrize("fault", OF_CALLS, ids=lambda fault: fault.name)
def test_a_fault_of_calls_is_found(fault: Fault) -> None:
    def with_fault(spec: str) -> Kernel:
        return build_kernel(spec) if spec == "eager" else fault.build()

    def right(spec: str) -> Kernel:
        return build_kernel(spec) if spec == "eager" else TileKernel("tile")

    found = outcome(fault, with_fault)
    assert found.verdict == "broken", found.reasons
    clean = outcome(fault, right)
    assert clean.verdict != "broken", clean.reasons
