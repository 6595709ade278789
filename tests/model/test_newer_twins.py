"""Architectures of 2026 against transformers' own classes on the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.newer_twins import NEWER_TWINS
from support.plain_arms import ExactArm, logits_of, relative
from support.tiny_files import TOKENS
from verify.model.architectures import architecture_of
from verify.model.gguf.file import GGUFFile
from verify.model.runner import Runner


@pytest.mark.parametrize("name", NEWER_TWINS)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    twin = NEWER_TWINS[name]
    model = twin.build(tmp_path / "twin.gguf")
    with torch.no_grad():
        expected = model(torch.from_numpy(TOKENS).long()[None]).logits[0]
    architecture = architecture_of(GGUFFile.open(tmp_path / "twin.gguf"))
    runner = Runner(architecture, device=torch.device("cpu"), attention_type="f32")
    found = logits_of(runner, TOKENS[None], [ExactArm()], range(len(TOKENS)))["exact"][0]
    assert relative(found, expected) < twin.agrees
