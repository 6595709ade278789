"""Commands on models with new kinds of layers: sinks and windows, layers without attention, shared keys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from support.cli import assert_refused, verify
from support.tiny_files import TinyFile
from support.tiny_models import TINY

# Layers with attention of each.
MODELS = {
    "gpt-oss": [0, 1, 2],
    "qwen35moe": [3],
    "gemma4-inputs-a-layer": [0, 1, 2, 3, 4, 5],
    # More heads in the layers with a window.
    "step35": [0, 1, 2, 3],
    "deepseek32-chosen": [0, 1],
}
KERNELS = ("--baseline", "eager", "--candidate", "eager:block=16,kv=2", "--device", "cpu")


def files(folder: Path, file: TinyFile) -> tuple[str, ...]:
    model = file.write(folder / "tiny.gguf", letters=True)
    text = folder / "text.txt"
    text.write_text("the heath, the moth; there he hath the other. " * 12)
    return ("-m", str(model), "-f", str(text))


@pytest.mark.parametrize("name", MODELS)
def test_a_perplexity_run_captures_the_layers_that_attend(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    given = (*files(tmp_path, TINY[name]), "-c", "48", "--chunks", "2", *KERNELS)
    done = verify("ppl", *given, "--capture", "all", "--out", str(run))
    assert done.returncode in (0, 3), done.stderr
    found = json.loads((run / "run.json").read_text())
    assert found["verdict"] in ("round-off", "improved", "identical", "inconclusive")
    captured = sorted((run / "captured").glob("layer-*.npz"))
    assert [int(file.stem.split("-")[1]) for file in captured] == MODELS[name]
    layers = pq.read_table(run / "layers.parquet")["layer"].to_pylist()
    assert sorted(set(layers)) == MODELS[name]
    with np.load(captured[0]) as stored:
        assert len(stored["sinks"]) == (8 if name == "gpt-oss" else 0)
        assert ("keys" in stored.files) == (name == "deepseek32-chosen")
    kernels = ("--candidate", "eager:block=16,kv=2", "--baseline", "eager", "--device", "cpu")
    compared = verify("diff", "--captured-from", str(run), *kernels, "--out", str(tmp_path / "diff"))
    assert compared.returncode in (0, 3), compared.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_text_is_written(tmp_path: Path, name: str) -> None:
    model = files(tmp_path, TINY[name])[:2]
    done = verify("gen", *model, "-p", "the moth", "-n", "6", *KERNELS, "--out", str(tmp_path / "gen"))
    assert done.returncode in (0, 3), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_prompt_may_be_computed_once(tmp_path: Path, name: str) -> None:
    given = (*files(tmp_path, TINY[name]), "-c", "48", "--chunks", "2", *KERNELS)
    done = verify("ppl", *given, "--score-last", "8", "--out", str(tmp_path / "run"))
    assert done.returncode in (0, 3), done.stderr


def test_a_layer_without_attention_is_not_captured(tmp_path: Path) -> None:
    given = (*files(tmp_path, TINY["qwen35moe"]), "-c", "48", *KERNELS)
    done = verify("ppl", *given, "--capture", "0,3", "--out", str(tmp_path / "run"))
    assert_refused(done, "--capture 0,3: layer 0 has no attention, expected some of 3")
