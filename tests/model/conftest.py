"""Tiny models of every architecture, built once, with the logits that transformers gives for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from support.twins import TWINS, VOCABULARY

TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, (2, 24)).astype(np.int32)


class Built(NamedTuple):
    """A twin's file, two windows of tokens [2, 24] and the logits [2, 24, vocabulary] expected for them."""

    path: Path
    tokens: np.ndarray
    expected: torch.Tensor


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """The twin of a name, built when it is first asked for."""
    folder = tmp_path_factory.mktemp("twins")
    built: dict[str, Built] = {}

    def get(name: str) -> Built:
        if name not in built:
            path = folder / f"{name}.gguf"
            model = TWINS[name].build(path)
            with torch.no_grad():
                built[name] = Built(path, TOKENS, model(torch.from_numpy(TOKENS).long()).logits)
        return built[name]

    return get
