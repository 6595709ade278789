"""Experts on a GPU: rows of many windows and arms lie side by side, and that moves no bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from support.plain_arms import ExactArm, logits_of
from support.synthetic_moe import MoeSizes, write_moe
from verify.model.architectures import architecture_of
from verify.model.gguf.file import GGUFFile
from verify.model.runner import Runner

pytestmark = pytest.mark.cuda

SIZES = MoeSizes(layers=3, width=512, heads=12, kv_heads=1, experts=16, used=4, inner=512, expert_inner=256)
N_CTX = 256


def test_neither_groups_nor_arms_move_a_bit(tmp_path: Path) -> None:
    """16,384 rows are a slab of 64 windows: whole slabs, one window of one, and a second arm."""
    architecture = architecture_of(GGUFFile.open(write_moe(tmp_path / "moe.gguf", SIZES)))
    tokens = np.random.default_rng(3).integers(0, 256, (130, N_CTX)).astype(np.int32)
    scored = range(N_CTX - 8, N_CTX - 1)

    def found(first: int, last: int, *names: str, device: str = "cuda") -> torch.Tensor:
        runner = Runner(architecture, device=torch.device(device))
        arms = [ExactArm(name) for name in names]
        logits = logits_of(runner, tokens[first:last], arms, scored, first_window=first)[names[-1]]
        assert all(runner.products.checked.values())
        return logits.cpu()

    whole = found(0, 130, "a", "b")
    assert torch.equal(found(0, 64, "a"), whole[:64])
    assert torch.equal(found(64, 128, "a", "b", "c"), whole[64:128])
    assert torch.equal(found(128, 130, "a"), whole[128:])
    assert torch.equal(found(70, 75, "a"), whole[70:75])
    on_cpu = found(0, 1, "a", device="cpu")
    assert float((whole[:1] - on_cpu).norm() / on_cpu.norm()) < 1e-4
