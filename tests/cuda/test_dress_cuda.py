"""A trained model in a large one's shape has its perplexity on the GPU too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.architectures import architecture_of
from model.dress import Dress, dress
from model.gguf_file import GGUFFile
from model.runner import Arm, Runner
from support.plain_arms import ExactArm, KernelArm, logits_of

GLM = Dress(to="glm4moe", copies=4, kv_heads=8, live=(0, 4, 7), head_size=128, experts="halves")
IDS = np.random.default_rng(9).integers(0, 40_000, (2, 128)).astype(np.int32)


def perplexity(path: Path, arm: Arm, *, attention_type: str = "f32") -> float:
    """exp of the mean negative log-likelihood of the windows' second halves."""
    architecture = architecture_of(GGUFFile.open(path))
    runner = Runner(architecture, device=torch.device("cuda"), attention_type=attention_type)
    scored = range(64, 127)
    logits = next(iter(logits_of(runner, IDS, [arm], scored).values()))
    targets = torch.from_numpy(IDS[:, 65:128]).long().to(logits.device)[..., None]
    return float((-logits.double().log_softmax(-1).gather(-1, targets)).mean().exp())


@pytest.mark.cuda
def test_the_perplexity_of_the_whole_model_stays(smollm: Path, tmp_path: Path) -> None:
    dressed = dress(smollm, tmp_path / "glm.gguf", GLM)
    assert perplexity(dressed, ExactArm()) == pytest.approx(perplexity(smollm, ExactArm()), rel=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_the_kernel_runs_the_large_shape(smollm: Path, tmp_path: Path, path: str) -> None:
    """float16 attention: the two models round other numbers, so they agree to what that rounding costs."""
    dressed = dress(smollm, tmp_path / "glm.gguf", replace(GLM, layers=6))
    expected = perplexity(dressed, ExactArm(), attention_type="f16")
    found = perplexity(dressed, KernelArm("flash:heads=8+4", path), attention_type="f16")
    assert found == pytest.approx(expected, rel=1e-3)
