"""Kernels that state nothing are read before they are judged: what hid in the loosest budget is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli import verify

KERNELS = """
import torch

def good(q, k, v, *, kv_len, scale, by=1.0):
    ratio = q.shape[2] // k.shape[2]
    s = scale * torch.einsum("bthd,bshd->bhts", q.float(), k.float().repeat_interleave(ratio, 2))
    s = s.masked_fill(torch.arange(k.shape[1]) >= kv_len[:, None, :, None], -torch.inf)
    p = torch.exp(s - s.amax(-1, keepdim=True).clamp(min=-1e30))
    l = p.sum(-1, keepdim=True).clamp(min=1e-30)
    p = p.half().float()
    o = torch.einsum("bhts,bshd->bhtd", p, v.float().repeat_interleave(ratio, 2)) / l
    return by * o.transpose(1, 2)

def off_by_a_little(q, k, v, *, kv_len, scale):
    return good(q, k, v, kv_len=kv_len, scale=scale, by=1 + 2e-4)

def unsteady(q, k, v, *, kv_len, scale):
    return good(q, k, v, kv_len=kv_len, scale=scale, by=1 + 1e-6 * float(torch.rand(())))
"""


@pytest.mark.xfail(
    strict=True, reason="`degraded` for `broken` since drawn inputs changed: to be looked into"
)
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
