"""A model that is broken itself is no kernel's fault: `void`, exit 4, the tensor named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.cli import verify
from support.ppl_runs import Tiny, run, write_tiny
from verify.model.gguf.file import GGUFFile

KERNELS = ("--baseline", "eager", "--candidate", "eager:block=16", "--chunks", "2", "-c", "32")


def damaged(folder: Path, tensor: str, value: float = np.nan) -> Tiny:
    """One number of a tensor of the tiny model replaced."""
    tiny = write_tiny(folder, restless=True)
    with GGUFFile.open(tiny.model) as file:
        info = file.tensor(tensor)
    assert info.type_name == "F32"
    content = bytearray(tiny.model.read_bytes())
    content[info.offset : info.offset + 4] = np.float32(value).tobytes()
    tiny.model.write_bytes(content)
    return tiny


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("output_norm.weight", np.nan),
        ("output.weight", np.inf),
        ("blk.1.ffn_down.weight", np.nan),
        pytest.param("blk.0.ffn_norm.weight", np.inf, marks=pytest.mark.slow),
        pytest.param("blk.1.attn_output.weight", np.nan, marks=pytest.mark.slow),
    ],
)
def test_ppl_is_void_and_names_the_tensor(tmp_path: Path, tensor: str, value: float) -> None:
    done, found = run(damaged(tmp_path, tensor, value), tmp_path / "run", *KERNELS)
    assert done.returncode == 4, done.stdout
    assert found["verdict"] == "void"
    assert found["reasons"] == [f"the model's own tensor {tensor} holds NaN or Inf"]


def test_a_model_that_overflows_names_the_layer(tmp_path: Path) -> None:
    done, found = run(damaged(tmp_path, "blk.0.ffn_norm.weight", 3e38), tmp_path / "run", *KERNELS)
    assert done.returncode == 4, done.stdout
    assert "overflows" in found["reasons"][0] and "after layer 0" in found["reasons"][0]


@pytest.mark.parametrize(
    "tensor", ["output_norm.weight", pytest.param("blk.1.ffn_down.weight", marks=pytest.mark.slow)]
)
def test_gen_is_void_and_names_the_tensor(tmp_path: Path, tensor: str) -> None:
    tiny = damaged(tmp_path, tensor)
    words = ["gen", "-m", str(tiny.model), "-p", "the the", "-n", "2", "--device", "cpu"]
    done = verify(*words, *KERNELS[:4], "--out", str(tmp_path / "run"))
    assert done.returncode == 4, done.stdout
    assert f"tensor {tensor} holds NaN or Inf" in done.stdout
