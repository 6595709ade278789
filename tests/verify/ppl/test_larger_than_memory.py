"""A model of 4 GB on a machine that may not hold it: memory stays small, and each tensor is read once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from support.synthetic_moe import MoeSizes, write_moe
from support.tiny_model import write_text
from verify.model.gguf.file import GGUFFile

# GLM-4.5-Air's layers, three of them with experts: 96 query heads over 8 KV heads, r = 12.
SIZES = MoeSizes(
    layers=4, dense=1, width=4096, heads=96, kv_heads=8, head_size=128, inner=10752, experts=128, used=8,
    expert_inner=1408,
)  # fmt: skip
# The same layers as Qwen3-235B-A22B's, and as gpt-oss-120b's with its experts in MXFP4.
OTHERS = {
    "glm4moe": SIZES,
    "qwen3moe": replace(SIZES, architecture="qwen3moe", dense=0, heads=64, kv_heads=4, layers=4),
    "gpt-oss": replace(
        SIZES, architecture="gpt-oss", dense=0, heads=64, kv_heads=8, head_size=64, width=2880, used=4,
        expert_inner=2880, layers=3,
    ),
}  # fmt: skip


def anonymous(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", OTHERS)
def test_a_model_larger_than_memory(tmp_path: Path, name: str) -> None:
    sizes = OTHERS[name]
    limit = 1.2e9 + 4 * sizes.expert_weights
    model, text = write_moe(tmp_path / "big.gguf", sizes), write_text(tmp_path / "text.txt", tokens=400)
    size = model.stat().st_size
    assert size > 4e9
    out = tmp_path / "run"
    command = [sys.executable, "-m", "verify", "ppl", "-m", str(model), "-f", str(text), "-c", "32"]
    command += ["--chunks", "2", "--device", "cpu", "--out", str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ.copy()
    )
    most = 0
    while process.poll() is None:
        try:
            most = max(most, anonymous(process.pid))
        except FileNotFoundError:
            break
        time.sleep(0.05)
    assert process.stdout is not None
    said = process.stdout.read().decode()
    assert process.wait() in (0, 3), said
    speed = json.loads((out / "run.json").read_text())["speed"]
    print(f"peak anonymous memory {most / 1e9:.3f} GB of {limit / 1e9:.3f}; {speed}")
    assert 3e8 < most < limit
    assert speed["groups"] == 1
    # Every tensor once, for five arms and both windows; of the experts those that were chosen.
    with GGUFFile.open(model) as file:
        experts = sum(t.n_bytes for t in file.tensors.values() if t.name.split(".")[-2].endswith("_exps"))
        rest = sum(t.n_bytes for t in file.tensors.values()) - experts
    assert rest < speed["read_bytes"] <= rest + experts
    assert f"in {speed['groups']} group" in said
