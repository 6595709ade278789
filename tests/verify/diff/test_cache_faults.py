"""Faults of caches in a cell of the kernel diff: each is a fault of its kernel, and no right one has any."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from verify.diff.cells import faults_of
from verify.diff.examining import CellInputs, examine
from verify.kernels.cache_types import LAW_CACHES, parse_cache
from verify.kernels.faults import CACHE_FAULTS, CacheFault
from verify.kernels.faults.caches import OverCache
from verify.kernels.heads import Heads
from verify.kernels.judging.families import InputSizes, draw
from verify.machine.stages import StageClock


def inputs(*, times: float = 1.0, layer: int | None = None) -> CellInputs:
    """A decode call of three keys heads and sizes that every rotation has; v multiplied."""
    call = draw(
        "gaussian", InputSizes(n_kv=(70,), heads=Heads(q=6, kv=2, k_size=64, v_size=64), spare=0, edges=()), 0
    )
    return CellInputs("6/2x64", 70, "gaussian", 0, replace(call, v=call.v * times, layer=layer))


@pytest.mark.parametrize("fault", CACHE_FAULTS, ids=lambda fault: fault.name)
def test_diff_says_that_a_fault_of_a_cache_is_one(fault: CacheFault) -> None:
    cache = parse_cache(fault.cache)
    kernels = [OverCache("right", cache=cache), fault.kind("wrong", cache=cache)]
    # Ranges of layers show in a model alone, and saturation beyond what a type holds.
    cell = inputs(times=600.0 if fault.name == "fp8 wraps" else 1.0, layer=1 if cache.layers else None)
    right, wrong = examine(kernels, cell, StageClock(torch.device("cpu")))
    assert right is not None and wrong is not None
    assert faults_of(right, "right") == []
    assert faults_of(wrong, "wrong") != []


@pytest.mark.parametrize("cache", LAW_CACHES)
def test_diff_finds_no_fault_in_right_caches(cache: str) -> None:
    (found,) = examine(
        [OverCache("right", cache=parse_cache(cache))], inputs(), StageClock(torch.device("cpu"))
    )
    assert found is not None and faults_of(found, "right") == []
