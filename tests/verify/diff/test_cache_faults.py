"""Faults of caches in a cell of the kernel diff: each is a fault of its kernel, and no right one has any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from verify.diff.cells import faults_of
from verify.diff.examining import CellInputs, examine
from verify.kernels.cache_types import LAW_CACHES, parse_cache
from verify.kernels.faults import CACHE_FAULTS, CacheFault
from verify.kernels.faults.caches import OverCache
from verify.kernels.heads import Heads
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.readback import look
from verify.kernels.registry import build_kernel
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


USERS = """
import torch

def attend(q, k, v, kv_len, scale):
    r = q.shape[2] // k.shape[2]
    s = torch.einsum("bthd,bshd->bths", q.float(), k.float().repeat_interleave(r, 2)) * scale
    s = s.masked_fill(torch.arange(k.shape[1]) >= kv_len[..., None, None], -torch.inf)
    out = torch.einsum("bths,bshd->bthd", s.softmax(-1), v.float().repeat_interleave(r, 2))
    return out, s.logsumexp(-1)

def eight_bits(x):
    blocks = x.float().unflatten(-1, (-1, 32))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / d).round() * d).flatten(-2).half()

def over_q8_0(q, k, v, *, kv_len, scale):
    return attend(q, eight_bits(k), eight_bits(v), kv_len, scale)

def forgets(q, k, v, *, kv_len, scale):
    return attend(q, k, v, kv_len, scale)

def keys_alone(q, k, v, *, kv_len, scale):
    return attend(q, eight_bits(k), v, kv_len, scale)
"""


def test_a_function_is_judged_on_the_cache_that_it_says_it_has(tmp_path: Path) -> None:
    """`py:FILE,cache=q8_0`: its own words are held against what is read back of it, and its results too."""
    file = tmp_path / "users.py"
    file.write_text(USERS)
    said = {}
    for function in ("over_q8_0", "forgets", "keys_alone"):
        kernel = build_kernel(f"py:{file}::{function},cache=q8_0")
        try:
            (found,) = examine([kernel], inputs(), StageClock(torch.device("cpu")))
            assert found is not None
            said[function] = look(kernel, inputs().call).fault, faults_of(found, function)
        finally:
            kernel.close()
    assert said["over_q8_0"] == (None, [])
    assert said["forgets"][0] == "K was to be kept as q8_0, and reads as what was given (f16)"
    assert said["keys_alone"][0] == "V was to be kept as q8_0, and reads as what was given (f16)"
    assert said["forgets"][1] and said["keys_alone"][1]
