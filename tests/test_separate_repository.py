"""A repository of somebody's, with kernels of its own: the wheel is installed, and their tests run.

Their `kernels/` is a package of that name, one of its kernels is Triton's (interpreted), one wraps torch's
own, one is wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_package import installed, wheel

__all__ = ["installed", "wheel"]

TRITON_KERNEL = '''
"""One query token a row: a program a sequence's row and head, the online softmax over tiles of keys."""
import torch
import triton
import triton.language as tl


@triton.jit
def decode(Q, K, V, O, LEN, scale, rows, heads, keys, RATIO: tl.constexpr, D: tl.constexpr,
           TILE: tl.constexpr):
    at, head = tl.program_id(0), tl.program_id(1)
    kv_heads, kv = heads // RATIO, head // RATIO
    d, j = tl.arange(0, D), tl.arange(0, TILE)
    q = tl.load(Q + (at * heads + head) * D + d).to(tl.float32)
    n = tl.load(LEN + at)
    first = (at // rows) * keys
    m, l, acc = -float("inf"), 0.0, tl.zeros([D], tl.float32)
    for start in range(0, n, TILE):
        here = start + j
        offsets = ((first + here) * kv_heads + kv)[:, None] * D + d[None, :]
        k = tl.load(K + offsets, mask=(here < n)[:, None], other=0.0).to(tl.float32)
        s = tl.where(here < n, tl.sum(k * q[None, :], 1) * scale, -float("inf"))
        new = tl.maximum(m, tl.max(s, 0))
        p = tl.exp(s - new)
        v = tl.load(V + offsets, mask=(here < n)[:, None], other=0.0).to(tl.float32)
        shrink = tl.exp(m - new)
        l = l * shrink + tl.sum(p, 0)
        acc = acc * shrink + tl.sum(p[:, None] * v, 0)
        m = new
    tl.store(O + (at * heads + head) * D + d, (acc / l).to(O.dtype.element_ty))


def attend(q, k, v, *, kv_len, scale):
    batch, rows, heads, size = q.shape
    out = torch.zeros_like(q)
    decode[(batch * rows, heads)](
        q, k, v, out, kv_len, scale, rows, heads, k.shape[1], RATIO=heads // k.shape[2], D=size, TILE=32
    )
    return out
'''
TORCH_KERNEL = """
import torch
import torch.nn.functional as F


def attend(q, k, v, lengths, scale):
    mask = torch.arange(k.shape[2]) < lengths[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


class Attention(torch.nn.Module):
    def forward(self, q, k, v, *, kv_len, scale):
        return attend(q, k, v, kv_len, scale)
"""
WRONG_KERNEL = """
from .with_torch import Attention

right = Attention()


def attend(q, k, v, *, kv_len, scale):
    # The newest key is lost once there is more than one tile of 32.
    return right(q, k, v, kv_len=kv_len - (kv_len > 32).int(), scale=scale)
"""
TESTS = """
import pytest
from kernels.with_torch import Attention
from kernels.wrong import attend as wrong


@pytest.mark.attention(shapes=["4/2x32"], n_kv=[33, 100], families=["needles", "peaked"], paths="decode")
def test_torch(attention_check):
    assert attention_check(Attention(), layout="bhsd").verdict == "round-off"


@pytest.mark.attention(shapes="2/1x32", n_kv=40, families=["probes"], paths="decode")
def test_triton(attention_check):
    from kernels.with_triton import attend
    attention_check(attend)


@pytest.mark.attention(shapes="4/2x32", n_kv=100, paths="decode")
def test_wrong(attention_check):
    attention_check(wrong, layout="bhsd")


def test_tensors_at_hand(attention_inputs):
    import verify
    x = attention_inputs
    out = Attention()(*(t.transpose(1, 2) for t in (x.q, x.k, x.v)), kv_len=x.kv_len, scale=x.scale)
    verify.assert_attention(x.q, x.k, x.v, out.transpose(1, 2), kv_len=x.kv_len)


@pytest.mark.attention(shapes="4/2x32", n_kv=40, families=["sinks"], paths="decode")
def test_sinks_are_skipped(attention_check):
    attention_check(Attention(), layout="bhsd")
"""
CONFTEST = """
import pytest


@pytest.fixture
def attention_inputs():
    import verify
    return verify.families.draw("needles", "4/2x32", n_kv=70, rows=4)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    files = {
        "kernels/__init__.py": "",
        "kernels/with_triton.py": TRITON_KERNEL,
        "kernels/with_torch.py": TORCH_KERNEL,
        "kernels/wrong.py": WRONG_KERNEL,
        "test_kernels.py": TESTS,
        "conftest.py": CONFTEST,
        "pytest.ini": "[pytest]\naddopts = --strict-markers -p no:cacheprovider\n",
    }
    (tmp_path / "kernels").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.slow
def test_their_tests_pass_where_kernels_are_right_and_name_the_key_of_the_wrong_one(
    repository: Path, installed: Path
) -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "PYTHONPATH": str(installed), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--junitxml", "junit.xml"]
    done = subprocess.run(
        [*command, "--attention-report", "checks"],
        cwd=repository, env=env, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-1000:]
    assert "1 failed, 6 passed, 1 skipped" in done.stdout, done.stdout[-3000:]
    cases = {case.get("name"): case for case in ElementTree.parse(repository / "junit.xml").iter("testcase")}
    assert {"test_torch[33-needles]", "test_torch[100-peaked]"} <= set(cases)
    (wrong,) = (case for case in cases.values() if case.find("failure") is not None)
    assert wrong.get("name") == "test_wrong[4/2x32-100-decode]"
    failure = wrong.find("failure")
    assert failure is not None
    said = f"{failure.get('message')}\n{failure.text}"
    for words in ("broken", "row 32 (n_kv 33)", "head 0", "key 32", "1/1x16 at 33 keys", "families.probe("):
        assert words in said, said
    # The page and the figures of every check, and a list of them, whichever process made them.
    pages = {file.stem for file in (repository / "checks").glob("*.html")}
    stored = [json.loads(file.read_text()) for file in (repository / "checks").glob("*.json")]
    assert len(pages) == len(stored) == 7
    assert sorted({x["verdict"] for x in stored}) == ["broken", "inconclusive", "round-off"]
    assert (repository / "checks/index.md").read_text().count("\n| [") == 7
