"""What drives a model: windows, steps with a cache, prompts, kernels, resuming; on every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.plain_arms import ExactArm, KernelArm, logits_of, relative
from support.tiny_files import TOKENS
from support.tiny_models import TINY
from verify.model.architectures import architecture_of
from verify.model.architectures.architecture import Architecture
from verify.model.gguf.file import GGUFFile
from verify.model.runner import Runner
from verify.model.steps import Stepper

CPU = torch.device("cpu")
# One of each kind of layer.
KINDS = [
    "gpt-oss",
    "gemma2-tight-softcaps",
    "minimax-m2",
    "step35",
    "qwen35moe",
    "qwen3next",
    "mistral4-yarn",
]
Load = Callable[[str], Architecture]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    folder = tmp_path_factory.mktemp("tiny")

    def get(name: str) -> Architecture:
        path: Path = folder / f"{name}.gguf"
        return architecture_of(GGUFFile.open(path if path.exists() else TINY[name].write(path)))

    return get


def window(architecture: Architecture, arms: list[Any], **options: Any) -> dict[str, torch.Tensor]:
    runner = Runner(architecture, device=CPU, attention_type="f32")
    scored = options.pop("scored", range(len(TOKENS)))
    return {
        name: found[0] for name, found in logits_of(runner, TOKENS[None], arms, scored, **options).items()
    }


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("steps", [(17, 1, 22), (1,) * 12 + (28,)], ids=["in pieces", "one by one"])
def test_steps_give_the_logits_of_the_window(load: Load, name: str, steps: tuple[int, ...]) -> None:
    whole = window(load(name), [ExactArm()])["exact"]
    stepper = Stepper(load(name), [ExactArm()], device=CPU, attention_type="f32")
    pieces = np.split(TOKENS, np.cumsum(steps)[:-1])
    found = [stepper.step(torch.from_numpy(piece))["exact"] for piece in pieces]
    assert relative(torch.cat(found), whole) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_a_branch_goes_on_from_where_its_arm_was(load: Load, name: str) -> None:
    whole = window(load(name), [ExactArm()])["exact"]
    stepper = Stepper(load(name), [ExactArm()], device=CPU, attention_type="f32")
    stepper.step(torch.from_numpy(TOKENS[:20]))
    other = stepper.branch(ExactArm("other"), after="exact")
    stepper.step(torch.tensor([1, 2, 3]))
    found = other.step(torch.from_numpy(TOKENS[20:]))["other"]
    assert relative(found, whole[20:]) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_a_prompt_is_computed_once_for_all_arms(load: Load, name: str) -> None:
    """Its keys, and the state of layers without attention, are what the rest goes on from."""
    whole = window(load(name), [ExactArm()])["exact"]
    rest = window(load(name), [ExactArm("a"), ExactArm("b")], scored=range(25, 40), prompt=ExactArm("prompt"))
    assert torch.equal(rest["a"], rest["b"])
    assert relative(rest["a"], whole[25:]) < 1e-5


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_kernels_take_what_a_layer_gives(load: Load, name: str, path: str) -> None:
    arm = KernelArm("eager:p=f32,heads=split,kv=2", path)
    found = window(load(name), [ExactArm(), arm])
    assert relative(found[arm.name], found["exact"]) < 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_a_run_goes_on_after_a_layer(load: Load, name: str) -> None:
    whole = window(load(name), [ExactArm()])["exact"]
    seen: list[tuple[int, Any]] = []
    window(load(name), [ExactArm()], layer_done=lambda layers, states: seen.append((layers, dict(states))))
    assert seen
    for begin in seen:
        assert torch.equal(window(load(name), [ExactArm()], begin=begin)["exact"], whole)


@pytest.mark.parametrize("name", KINDS)
def test_other_windows_and_arms_change_no_bit(load: Load, name: str) -> None:
    runner = Runner(load(name), device=CPU)
    tokens = np.stack([TOKENS, TOKENS[::-1]])
    together = logits_of(runner, tokens, [ExactArm("a"), ExactArm("b")], range(40))
    assert torch.equal(together["a"], together["b"])
    for w in range(2):
        alone = logits_of(runner, tokens[w : w + 1], [ExactArm("a")], range(40))
        assert torch.equal(alone["a"][0], together["a"][w])
