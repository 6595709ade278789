"""What used to end in an internal error, and is bad input or a verdict."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.cli import assert_refused, verify
from support.logits_files import write_file
from support.ppl_runs import Tiny, command, write_tiny
from support.rewrite import rewrite
from support.tiny_model import write_tiny_model
from verify.diff.captured import captured_inputs
from verify.kernels.errors import KernelFailure, MachineFailure
from verify.kernels.said import one_line, visible
from verify.machine.errors import UsageError
from verify.model.architectures import architecture_of
from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("base", [0.0, 1.0, -1.0])
def test_a_rotation_that_no_model_has_is_refused_when_the_file_is_opened(
    tiny: Tiny, tmp_path: Path, base: float
) -> None:
    keys: dict[str, Any] = {
        "rope.freq_base": base,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }
    model = rewrite(tiny.model, tmp_path / "model.gguf", keys=keys)
    with GGUFFile.open(model) as file, pytest.raises(ModelError, match=r"rope\.freq_base"):
        architecture_of(file)


@pytest.mark.parametrize("eps", [-1e-5, 1e38])
def test_an_epsilon_that_no_model_has_is_refused(tiny: Tiny, tmp_path: Path, eps: float) -> None:
    keys = {"attention.layer_norm_rms_epsilon": eps}
    model = rewrite(tiny.model, tmp_path / "model.gguf", keys=keys)
    with GGUFFile.open(model) as file, pytest.raises(ModelError, match="rms_epsilon"):
        architecture_of(file)


@pytest.mark.parametrize(("scale", "least"), [(1e-3, -2000.0), (1e-3, 1e30), (1e30, -20.0), (-1.0, -20.0)])
def test_logits_that_no_writer_makes_are_a_damaged_file(tmp_path: Path, scale: float, least: float) -> None:
    write_file(tmp_path / "good.kld", n_vocab=40, n_chunk=2)
    content = bytearray((tmp_path / "good.kld").read_bytes())
    # The head of the file's last record.
    record = len(content) - (8 + 2 * 40)
    content[record : record + 8] = struct.pack("<2f", scale, least)
    (tmp_path / "bad.kld").write_bytes(content)
    for files in (("good.kld", "bad.kld"), ("bad.kld", "good.kld")):
        done = verify("kld", *(str(tmp_path / name) for name in files))
        assert_refused(done, "bad.kld", "window 2", "the file is damaged")


@pytest.mark.parametrize("command_of", ["ppl", "gen", "diff", "props", "bench"])
def test_a_tile_of_billions_of_keys_is_no_specification(tiny: Tiny, tmp_path: Path, command_of: str) -> None:
    spec = "eager:block=99999999984"
    words = {
        "ppl": [*command(tiny, tmp_path / "run"), "--candidate", spec],
        "gen": ["gen", "-m", str(tiny.model), "-p", "x", "--candidate", spec],
        "diff": ["diff", "--candidate", spec],
        "props": ["props", spec],
        "bench": ["bench", spec],
    }[command_of]
    assert_refused(verify(*words), "block=99999999984", "up to 65536")


def test_memory_that_a_kernel_of_ours_cannot_have_is_no_fault_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from support.problems import problem
    from verify.arms.attempt import attempt
    from verify.kernels.registry import build_kernel

    kernel = build_kernel("eager")

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(kernel, "run", full)
    with pytest.raises(MachineFailure, match="too little memory"):
        attempt(kernel, problem())


def captured(folder: Path, **change: Any) -> Path:
    """A captured layer with some of its arrays replaced; None: left out."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "q": rng.normal(size=(1, 8, 4, 16)).astype(np.float32),
        "k": rng.normal(size=(1, 8, 2, 16)).astype(np.float32),
        "v": rng.normal(size=(1, 8, 2, 16)).astype(np.float32),
        "kv_len": np.arange(1, 9, dtype=np.int32)[None],
        "scale": np.float64(0.25),
        "sliding_window": np.int64(0),
        "softcap": np.float64(0),
        "dtype": np.array("float16"),
    } | change
    (folder / "captured").mkdir()
    packed = arrays.pop("packed", False)
    with (folder / "captured/layer-000.npz").open("wb") as file:
        given = {name: x for name, x in arrays.items() if x is not None}
        np.savez_compressed(file, **given) if packed else np.savez(file, **given)
    return folder


def test_a_captured_layer_is_read(tmp_path: Path) -> None:
    import torch

    (found,) = captured_inputs(str(captured(tmp_path)), "decode", torch.device("cpu"))
    assert found.family == "layer 0"


@pytest.mark.parametrize(
    "change",
    [
        {"q": np.full((1, 8, 4, 16), np.nan, np.float32)},
        {"q": np.zeros(5, np.float32)},
        {"q": np.array("text")},
        {"k": np.zeros((1, 8, 2, 16), np.float64)},
        {"v": np.zeros((1, 7, 2, 16), np.float32)},
        {"v": None},
        {"kv_len": np.arange(8)},
        {"kv_len": np.array("text")},
        {"kv_len": np.full((1, 8), 99, np.int32)},
        {"scale": np.ones(3)},
        {"scale": np.float64("nan")},
        {"scale": np.array("text")},
        {"softcap": np.float64("inf")},
        {"sliding_window": np.array("x")},
        {"dtype": np.array("nn")},
        {"dtype": np.array("int32")},
        {"sinks": np.zeros(3, np.float32)},
        {"sinks": np.array(["a"] * 4)},
        {"packed": True},
    ],
    ids=str,
)
def test_a_captured_layer_that_is_none_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    import torch

    folder = captured(tmp_path, **change)
    with pytest.raises(UsageError, match=r"layer-000\.npz cannot be read"):
        list(captured_inputs(str(folder), "decode", torch.device("cpu")))


def test_captured_layers_are_no_links_and_no_pipes(tmp_path: Path) -> None:
    import torch

    folder = captured(tmp_path)
    layer = folder / "captured/layer-000.npz"
    layer.rename(tmp_path / "elsewhere.npz")
    layer.symlink_to(tmp_path / "elsewhere.npz")
    with pytest.raises(UsageError, match="cannot be read"):
        list(captured_inputs(str(folder), "decode", torch.device("cpu")))
    layer.unlink()
    os.mkfifo(layer)
    with pytest.raises(UsageError, match="is not a plain file"):
        list(captured_inputs(str(folder), "decode", torch.device("cpu")))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100_000])
@pytest.mark.parametrize("words", [("sweep",), ("explain", "--texts")])
def test_json_nested_without_end_is_refused(tmp_path: Path, content: str, words: tuple[str, ...]) -> None:
    (tmp_path / "deep").write_text(content)
    done = verify(*words, str(tmp_path / "deep"), str(tmp_path / "deep"))
    assert done.returncode in (0, 2, 3) and "Recursion" not in done.stderr, done.stderr


def test_a_case_nested_without_end_is_refused() -> None:
    assert_refused(verify("props", "eager", "--law", "row-alone", "--case", "[" * 100_000), "--case")


def test_a_device_is_no_log() -> None:
    assert_refused(verify("sweep", "/dev/zero", "/dev/zero"), "/dev/zero", "is a device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_report_that_cannot_be_written_is_one_line() -> None:
    done = verify("props", "eager", "--law", "merge-exact", "--examples", "1", "--junit", "/dev/full")
    assert done.returncode == 2
    assert "--junit /dev/full: cannot be written: No space left" in done.stderr


def test_a_name_on_the_hub_with_dots_is_refused() -> None:
    assert_refused(verify("ppl", "-m", "hf:a/b/\\..\\x.gguf", "-f", __file__), "hf:a/b")


def test_a_message_is_one_short_line_whatever_is_in_the_file(tmp_path: Path) -> None:
    """3 MB of an architecture's name made a message of 3 MB."""
    model = write_tiny_model(tmp_path / "model.gguf", architecture="x" * 3_000_000)
    done = verify("ppl", "-m", str(model), "-f", __file__)
    assert done.returncode == 2
    assert len(done.stderr) < 3000 and len(done.stderr.splitlines()) == 1


def test_text_from_elsewhere_is_cleaned_once() -> None:
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x1b[2J\x07\x9b\ud800\u202e\u2028") == "\\x1b[2J\\x07\\x9b\\ud800\\u202e\\u2028"
    assert one_line("two\n  lines \r\n") == "two lines"
    long = one_line("word " * 100_000)
    assert len(long) < 2100 and long.endswith("(500000 letters)")
    failure = KernelFailure("raised", "x\ud800\x1b[2J\n" * 10_000)
    assert len(str(failure)) < 2100 and "\x1b" not in str(failure)
    assert json.dumps(str(failure)).isascii()
