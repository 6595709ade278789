"""Tiny files of every architecture against llama.cpp itself: the engine where it is here, else its logits
as they were stored.

    python tests/model/test_engine.py        asks the engine and stores its logits anew
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from support.model_engine import ModelEngine, model_engine
from support.plain_arms import ExactArm, logits_of, relative
from support.tiny_files import TOKENS
from support.tiny_models import TINY, three_tensors
from verify.model.architectures import ARCHITECTURES, architecture_of
from verify.model.gguf.file import GGUFFile
from verify.model.runner import Runner

STORED = Path(__file__).parent / "oracles" / "engine_logits.npz"
# Positions whose logits are stored.
LAST = slice(-3, None)
AGREES = 1e-4
# The engine reads GELU from a table in float16.
BY_TABLE, AGREES_BY_TABLE = ("gemma",), 5e-4


def tolerance(name: str) -> float:
    return AGREES_BY_TABLE if name.startswith(BY_TABLE) else AGREES


def logits(path: Path) -> np.ndarray:
    runner = Runner(architecture_of(GGUFFile.open(path)), device=torch.device("cpu"), attention_type="f32")
    found = logits_of(runner, TOKENS[None], [ExactArm()], range(len(TOKENS)))["exact"][0].numpy()
    runner.stream.close()
    return found


@pytest.fixture(scope="module")
def file_named(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("tiny")

    def get(name: str) -> Path:
        path = folder / f"{name}.gguf"
        return path if path.exists() else TINY[name].write(path)

    return get


@pytest.fixture(scope="module")
def engine() -> Iterator[ModelEngine]:
    found = model_engine()
    yield found
    found.close()


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(STORED) as file:
        return dict(file)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_the_engine_gave(
    file_named: Callable[[str], Path], stored: dict[str, np.ndarray], name: str
) -> None:
    assert relative(logits(file_named(name))[LAST], stored[name]) < tolerance(name)


@pytest.mark.parametrize("name", TINY)
def test_logits_are_those_of_the_engine(
    file_named: Callable[[str], Path], engine: ModelEngine, name: str
) -> None:
    path = file_named(name)
    assert relative(logits(path), engine.logits(path, TOKENS)) < tolerance(name)


def test_weights_that_are_there_twice(file_named: Callable[[str], Path], tmp_path: Path) -> None:
    """What ik_llama.cpp's converter writes; mainline's engine does not load it."""
    twice = three_tensors().write(tmp_path / "twice.gguf")
    assert relative(logits(twice), logits(file_named("deepseek2"))) < 1e-6


def test_every_architecture_has_been_compared() -> None:
    assert {file.architecture for file in TINY.values()} == set(ARCHITECTURES)


def _store() -> None:
    """Write what the engine gives for every file."""
    import tempfile

    engine, found = ModelEngine(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, file in TINY.items():
            found[name] = engine.logits(file.write(Path(folder) / "tiny.gguf"), TOKENS)[LAST]
    engine.close()
    np.savez_compressed(STORED, **found)  # type: ignore[arg-type]


if __name__ == "__main__":
    _store()
