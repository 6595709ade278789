"""Token by token with a cache gives what whole windows give."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.plain_arms import ExactArm, KernelArm, logits_of, relative
from support.tiny_models import TINY
from support.twins import VOCABULARY
from verify.model.architectures import architecture_of
from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile
from verify.model.runner import Runner
from verify.model.steps import Stepper, weight_bytes

CPU = torch.device("cpu")
TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, 20).astype(np.int32)


@pytest.mark.parametrize("name", ["llama", "gemma3", "glm4moe", "deepseek2"])
@pytest.mark.parametrize("steps", [(20,), (7, 1, 12), (1,) * 20], ids=["at once", "in pieces", "one by one"])
def test_steps_give_the_logits_of_the_window(
    name: str, steps: tuple[int, ...], twin: Callable[[str], Any]
) -> None:
    architecture = architecture_of(GGUFFile.open(twin(name).path))
    runner = Runner(architecture, device=CPU, attention_type="f32")
    whole = logits_of(runner, TOKENS[None], [ExactArm()], range(20))["exact"][0]
    stepper = Stepper(architecture, [ExactArm()], device=CPU, attention_type="f32")
    pieces = np.split(TOKENS, np.cumsum(steps)[:-1])
    found = [stepper.step(torch.from_numpy(piece))["exact"] for piece in pieces]
    assert stepper.length == 20
    assert relative(torch.cat(found), whole) < 1e-5


def test_weights_need_not_be_kept(twin: Callable[[str], Any]) -> None:
    architecture = architecture_of(GGUFFile.open(twin("llama").path))
    both = [
        Stepper(architecture, [ExactArm()], device=CPU, keep_weights=keep).step(torch.from_numpy(TOKENS))
        for keep in (True, False)
    ]
    assert torch.equal(*(logits["exact"] for logits in both))


def test_branches_share_the_reading_of_the_file(twin: Callable[[str], Any]) -> None:
    stepper = Stepper(architecture_of(GGUFFile.open(twin("glm4moe").path)), [ExactArm()], device=CPU)
    stepper.step(torch.arange(5))
    before = threading.active_count()
    for _ in range(3):
        stepper.branch(ExactArm("other"), after="exact").step(torch.tensor([7]))
        stepper.beside([ExactArm("other")]).step(torch.tensor([7]))
    assert threading.active_count() == before
    stepper.close()
    assert threading.active_count() == before - 1


@pytest.mark.parametrize("tokens", [[], [VOCABULARY], [-1]])
def test_tokens_outside_the_vocabulary_are_refused(twin: Callable[[str], Any], tokens: list[int]) -> None:
    stepper = Stepper(architecture_of(GGUFFile.open(twin("llama").path)), [ExactArm()], device=CPU)
    with pytest.raises(ModelError, match="expected at least one" if not tokens else f"has {VOCABULARY} rows"):
        stepper.step(torch.tensor(tokens, dtype=torch.int64))


def test_arms_side_by_side_are_each_as_if_alone(twin: Callable[[str], Any]) -> None:
    architecture = architecture_of(GGUFFile.open(twin("glm4moe").path))
    arms = [ExactArm(), KernelArm("eager:block=16,acc=f16", "decode"), KernelArm("eager:block=16", "decode")]
    pieces = np.split(TOKENS, [9, 10])

    def last(stepper: Stepper) -> dict[str, torch.Tensor]:
        return [stepper.step(torch.from_numpy(piece)) for piece in pieces][-1]

    together = last(Stepper(architecture, arms, device=CPU))
    assert not torch.equal(*(together[arm.name] for arm in arms[1:]))
    for arm in arms:
        assert torch.equal(last(Stepper(architecture, [arm], device=CPU))[arm.name], together[arm.name])


def test_logits_of_the_last_tokens_alone(twin: Callable[[str], Any]) -> None:
    architecture = architecture_of(GGUFFile.open(twin("llama").path))
    whole, part, none = (
        Stepper(architecture, [ExactArm()], device=CPU).step(torch.from_numpy(TOKENS), scored=scored)
        for scored in (None, 3, 0)
    )
    assert relative(part["exact"], whole["exact"][-3:]) < 1e-6
    assert none == {}


def test_a_branch_goes_its_own_way(twin: Callable[[str], Any]) -> None:
    architecture = architecture_of(GGUFFile.open(twin("llama").path))
    stepper = Stepper(architecture, [ExactArm()], device=CPU)
    stepper.step(torch.from_numpy(TOKENS[:10]))
    branch = stepper.branch(ExactArm("other"), after="exact")
    branch.step(torch.tensor([1, 2, 3]))
    assert (stepper.length, branch.length) == (10, 13)
    straight = Stepper(architecture, [ExactArm()], device=CPU)
    straight.step(torch.from_numpy(TOKENS[:10]))
    rest = torch.from_numpy(TOKENS[10:])
    assert torch.equal(stepper.step(rest)["exact"], straight.step(rest)["exact"])
    start = stepper.beside([ExactArm()])
    assert start.length == 0
    assert torch.equal(
        start.step(rest)["exact"], Stepper(architecture, [ExactArm()], device=CPU).step(rest)["exact"]
    )


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cut_sequence_goes_on_as_if_never_longer(name: str, twin: Callable[[str], Any]) -> None:
    architecture = architecture_of(GGUFFile.open(twin(name).path))
    cut, straight = (Stepper(architecture, [ExactArm()], device=CPU) for _ in range(2))
    for one in (cut, straight):
        one.step(torch.from_numpy(TOKENS[:12]))
    cut.step(torch.tensor([1, 2, 3, 4]))
    cut.cut(12)
    assert torch.equal(*(one.step(torch.from_numpy(TOKENS[12:15]))["exact"] for one in (cut, straight)))
    with pytest.raises(ModelError, match="length 16: expected 0 to 15 tokens"):
        cut.cut(16)


def test_a_recurrent_state_cannot_be_cut(tmp_path: Path) -> None:
    architecture = architecture_of(GGUFFile.open(TINY["qwen35"].write(tmp_path / "tiny.gguf")))
    stepper = Stepper(architecture, [ExactArm()], device=CPU)
    stepper.step(torch.arange(5))
    with pytest.raises(ModelError, match="recurrent layers"):
        stepper.cut(4)


def test_an_arm_that_fails_leaves_the_others(twin: Callable[[str], Any]) -> None:
    architecture = architecture_of(GGUFFile.open(twin("llama").path))
    stepper = Stepper(architecture, [ExactArm("fails", fails_at=1), ExactArm()], device=CPU)
    assert list(stepper.step(torch.from_numpy(TOKENS))) == ["exact"]
    assert list(stepper.step(torch.from_numpy(TOKENS))) == ["exact"]


def test_the_memory_of_the_weights(twin: Callable[[str], Any]) -> None:
    architecture = architecture_of(GGUFFile.open(twin("llama").path))
    stepper = Stepper(architecture, [ExactArm()], device=CPU)
    stepper.step(torch.from_numpy(TOKENS))
    held = {id(w): w for weights in stepper._kept.values() for w in weights.values()}
    assert weight_bytes(architecture) == sum(4 * w.numel() for w in held.values())
