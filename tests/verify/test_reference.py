"""A model's logits for others, as a function and as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.cli import assert_refused, verify
from support.tiny_files import TOKENS, VOCABULARY, WIDTH
from support.tiny_model import write_text, write_tiny_model
from support.tiny_models import TINY
from verify import reference_logits
from verify.machine.errors import UsageError
from verify.reference import reference

STORED = Path(__file__).parents[1] / "model" / "oracles" / "engine_logits.npz"


@pytest.mark.parametrize("name", ["gpt-oss", "qwen35moe", "deepseek2-yarn"])
@pytest.mark.parametrize("kernel", ["exact", "eager:p=f32,kv=2"])
def test_logits_are_those_of_the_engine(tmp_path: Path, name: str, kernel: str) -> None:
    model = TINY[name].write(tmp_path / "tiny.gguf")
    found = reference_logits(model, TOKENS.tolist(), kernel=kernel, cache_type="f32", device="cpu")
    assert (found.dtype, found.shape) == (np.float32, (len(TOKENS), VOCABULARY))
    with np.load(STORED) as stored:
        expected = stored[name]
    assert np.abs(found[-len(expected) :] - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_cache_of_half_precision_is_the_default(tmp_path: Path) -> None:
    model = TINY["llama"].write(tmp_path / "tiny.gguf")
    plain, half = (reference_logits(model, TOKENS, device="cpu", **c) for c in ({}, {"cache_type": "f16"}))
    assert np.array_equal(plain, half)
    assert not np.array_equal(plain, reference_logits(model, TOKENS, cache_type="f32", device="cpu"))


def test_hidden_states_on_request(tmp_path: Path) -> None:
    """Those after the last layer give the logits; those before the first are the embeddings."""
    file = TINY["llama"]
    found = reference(file.write(tmp_path / "tiny.gguf"), TOKENS, hidden=(0, 2), device="cpu")
    assert {layer: x.shape for layer, x in found.hidden.items()} == dict.fromkeys((0, 2), (40, WIDTH))
    tensors = file.tensors()
    assert found.hidden[0] == pytest.approx(tensors["token_embd.weight"][TOKENS].astype(np.float32))
    last = found.hidden[2].astype(np.float64)
    normed = last / np.sqrt((last**2).mean(-1, keepdims=True) + 1e-5) * tensors["output_norm.weight"]
    assert found.logits == pytest.approx(normed @ tensors["output.weight"].T, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"token_ids": []}, "token ids: expected whole numbers"),
        ({"token_ids": [[1, 2]]}, r"expected whole numbers \[tokens\]"),
        ({"token_ids": [0.5]}, "got float64"),
        ({"token_ids": [VOCABULARY]}, "the text's tokens go from 64 to 64"),
        ({"cache_type": "q9_0"}, "cache type: cache 'q9_0': unknown type 'q9_0'"),
        ({"kernel": "exakt"}, "unknown kernel"),
        ({"kernel": "eager:heads=7"}, "does not fit this model"),
        ({"hidden": [3]}, "hidden states after 3 layers: expected 0 to 2"),
        ({"path": "both"}, "path 'both': expected one of decode"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, options: dict[str, object], said: str) -> None:
    model = TINY["llama"].write(tmp_path / "tiny.gguf")
    given: dict[str, object] = {"token_ids": [1, 2], "device": "cpu"} | options
    with pytest.raises(ValueError, match=said) as caught:
        reference(model, **given)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, (UsageError, ValueError))


def test_longer_than_a_model_can_be_computed(tmp_path: Path) -> None:
    # Of a file without its indexer.
    whole = TINY["glm-dsa-as-many-keys-as-tokens"]
    file = whole.with_(drop=tuple(name for name in whole.shapes if ".indexer." in name))
    model = file.write(tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match="41 tokens: from 40 keys on the model attends to a choice"):
        reference_logits(model, [*TOKENS, 1], device="cpu")


def test_the_name_is_there_and_loads_torch_when_it_is_used() -> None:
    loaded = "print('torch' in sys.modules)"
    code = f"import sys, verify; {loaded}; verify.reference_logits; {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_the_command_writes_a_file(tmp_path: Path) -> None:
    model, text = write_tiny_model(tmp_path / "tiny.gguf"), write_text(tmp_path / "text.txt")
    out = tmp_path / "logits.npz"
    done = verify(
        "logits",
        "-m",
        str(model),
        "-f",
        str(text),
        "-n",
        "24",
        "--hidden",
        "0,1",
        "--device",
        "cpu",
        "--out",
        str(out),
    )
    assert done.returncode == 0, done.stderr
    with np.load(out) as found:
        assert set(found) == {"tokens", "logits", "hidden_0", "hidden_1"}
        assert found["tokens"].shape == (24,)
        expected = reference_logits(model, found["tokens"], device="cpu")
        assert np.array_equal(found["logits"], expected)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--out", "logits.txt"), "expected a file that ends in .npz"),
        (("--out", "a.npz", "-n", "0"), "-n 0: expected at least 1"),
        (("--out", "a.npz", "--hidden", "x"), "--hidden x: expected numbers of layers"),
        (("--out", "a.npz", "-f", "none.txt"), "none.txt"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    text = write_text(tmp_path / "text.txt")
    given = () if "-f" in more else ("-f", str(text))
    assert_refused(verify("logits", *given, *more), said)
