"""Kernels that state nothing are read before they are judged: what hid in the loosest budget is found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from support.cli import verify
from verify.diff.inputs import DiffSettings, all_inputs, lengths_to_read
from verify.identify.learning import learn
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.plans.shapes import shape_named
from verify.kernels.registry import build_kernel
from verify.machine.stages import StageClock

KERNELS = """
import torch

def good(q, k, v, *, kv_len, scale, by=1.0, exact=False):
    ratio = q.shape[2] // k.shape[2]
    s = scale * torch.einsum("bthd,bshd->bhts", q.float(), k.float().repeat_interleave(ratio, 2))
    s = s.masked_fill(torch.arange(k.shape[1]) >= kv_len[:, None, :, None], -torch.inf)
    p = torch.exp(s - s.amax(-1, keepdim=True).clamp(min=-1e30))
    l = p.sum(-1, keepdim=True).clamp(min=1e-30)
    p = p if exact else p.half().float()
    o = torch.einsum("bhts,bshd->bhtd", p, v.float().repeat_interleave(ratio, 2)) / l
    return by * o.transpose(1, 2)

def two_kernels(q, k, v, *, kv_len, scale):
    return good(q, k, v, kv_len=kv_len, scale=scale, exact=q.shape[1] == 1)

def off_by_a_little(q, k, v, *, kv_len, scale):
    return good(q, k, v, kv_len=kv_len, scale=scale, by=1 + 2e-4)

def unsteady(q, k, v, *, kv_len, scale):
    return good(q, k, v, kv_len=kv_len, scale=scale, by=1 + 1e-6 * float(torch.rand(())))
"""


def test_a_small_factor_in_a_kernel_that_states_nothing_is_broken(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(KERNELS)
    names = ("good", "off_by_a_little", "unsteady")
    candidates = [word for name in names for word in ("--candidate", f"py:{file}::{name}")]
    more = ("--shape", "4/1x64", "--n-kv", "100", "--inputs", "gaussian", "--rows", "16")
    done = verify("diff", "--baseline", "eager", *candidates, *more, "--out", str(tmp_path / "d"), "--json")
    run = json.loads(done.stdout)
    verdicts = {pair["candidate"].rpartition("::")[2]: pair["verdict"] for pair in run["pairs"]}
    assert verdicts["good"] != "broken" and verdicts["off_by_a_little"] == "broken", done.stderr
    said = done.stderr
    assert "good: read off it: P float16, sums float32, result float32" in said
    assert "unsteady: nothing could be read off it: it is not deterministic" in said


def test_a_call_of_tokens_between_two_readings_is_allowed_both(tmp_path: Path) -> None:
    """A kernel in float32 for one token and with P in float16 from two on changes between 1 and 7."""
    file = tmp_path / "mine.py"
    file.write_text(KERNELS)
    heads = shape_named("2/1x32").heads
    known = {}
    for most in (6, 7):
        kernel = build_kernel(f"py:{file}::two_kernels")
        asked = [("prefill", 1), ("prefill", most)]
        learn(kernel, [heads], [64], path="prefill", dtype=torch.float16, device="cpu", calls=asked)
        assert kernel.identified is not None
        for tokens in (1, 6, 7, 40):
            sizes = InputSizes(n_kv=(30,) * tokens, heads=heads, path="prefill")
            found = kernel.identified(draw("gaussian", sizes, 1))
            known[most, tokens] = found and found.p
        assert kernel.identified(replace(draw("gaussian", sizes, 1), path="decode")) is None
    assert known == {
        (6, 1): "f32", (6, 6): "f16", (6, 7): "f16", (6, 40): "f16",
        (7, 1): "f32", (7, 6): None, (7, 7): "f16", (7, 40): "f16",
    }  # fmt: skip


@pytest.mark.parametrize("sequences", [1, 3])
def test_something_is_known_of_every_row_that_a_diff_draws(tmp_path: Path, sequences: int) -> None:
    """A budget is of a whole call: one row shorter than all that was read, and it is the loosest again."""
    file = tmp_path / "mine.py"
    file.write_text(KERNELS)
    kernel = build_kernel(f"py:{file}::good")
    settings = DiffSettings(
        shapes=("2/1x32",),
        n_kvs=(300, 160),
        families=("gaussian", "peaked"),
        baseline="eager",
        candidates=(kernel.spec,),
        device="cpu",
        rows=5,
        sequences=sequences,
    )
    heads, lengths = shape_named("2/1x32").heads, lengths_to_read(settings)
    learn(kernel, [heads], lengths, path="decode", dtype=torch.float16, device="cpu")
    assert kernel.identified is not None
    for cell in all_inputs(settings, torch.device("cpu"), StageClock(torch.device("cpu"))):
        known = kernel.identified(cell.call)
        assert known is not None and known.p == "f16" and known.acc == "f32", cell
