"""The trained model in every dress has its perplexity on the GPU too, in decode and in prefill.

The dressed files are made here, on the machine with the GPU: two of all layers (about 2.5 GB each), the
others of six layers, each gone when its test ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from support.dresses import DRESSES, GLM, perplexity
from support.plain_arms import ExactArm, KernelArm
from verify.model import blocks
from verify.model.dressing.dress import Dress, dress

pytestmark = pytest.mark.cuda

IDS = np.random.default_rng(9).integers(0, 40_000, (2, 128)).astype(np.int32)
# The chain llama r = 3 -> llama r = 12 -> glm4moe r = 12 keeps all layers.
WHOLE = ("llama-r12", "glm-halves")
FEW = 6


@pytest.fixture(scope="module")
def expected(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The perplexity of the original, of all its layers or of the first `layers`."""

    @cache
    def of(layers: int | None) -> float:
        if layers is None:
            path = smollm
        else:
            path = dress(smollm, tmp_path_factory.mktemp("cut") / "cut.gguf", Dress(layers=layers))
        return perplexity(path, IDS, [ExactArm()], device="cuda")["exact"]

    yield of


@pytest.mark.parametrize("name", DRESSES)
def test_every_dress_keeps_the_perplexity(  # type: ignore[no-untyped-def]
    smollm: Path, tmp_path: Path, expected, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "gpt-oss":
        # The model's gates go beyond the clamp here and there, which moves perplexity by itself.
        monkeypatch.setattr(blocks, "OSS_LIMIT", 1e9)
    layers = None if name in WHOLE else FEW
    dressed = dress(smollm, tmp_path / "dressed.gguf", replace(DRESSES[name], layers=layers))
    arms = [ExactArm(), KernelArm("eager:p=f32", "decode"), KernelArm("eager:p=f32,kv=2", "prefill")]
    found = perplexity(dressed, IDS, arms, device="cuda")
    dressed.unlink()
    assert len(found) == 3
    assert found == pytest.approx(dict.fromkeys(found, expected(layers)), rel=1e-5)


def test_the_cuda_kernel_runs_the_large_shape(smollm: Path, tmp_path: Path) -> None:
    """float16 attention: kernel and oracle round other numbers, so they agree to what that rounding costs."""
    dressed = dress(smollm, tmp_path / "dressed.gguf", replace(GLM, layers=FEW))
    arms = [ExactArm(), KernelArm("flash:heads=8+4", "decode"), KernelArm("flash:heads=8+4", "prefill")]
    found = perplexity(dressed, IDS, arms, device="cuda", attention_type="f16")
    dressed.unlink()
    assert len(found) == 3
    assert found == pytest.approx(dict.fromkeys(found, found["exact"]), rel=1e-3)
