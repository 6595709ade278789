"""Token by token with a cache gives what whole windows give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from model.architectures import architecture_of
from model.errors import ModelError
from model.gguf_file import GGUFFile
from model.runner import LayerCall, Runner
from model.steps import Stepper
from support.plain_arms import ExactArm, logits_of, relative
from support.twins import VOCABULARY

CPU = torch.device("cpu")
TOKENS = np.random.default_rng(5).integers(0, VOCABULARY, 20).astype(np.int32)


def exact(call: LayerCall) -> torch.Tensor:
    out = ExactArm().attend(call)
    assert out is not None
    return out


@pytest.mark.parametrize("name", ["llama", "gemma3", "glm4moe", "deepseek2"])
@pytest.mark.parametrize("steps", [(20,), (7, 1, 12), (1,) * 20], ids=["at once", "in pieces", "one by one"])
def test_steps_give_the_logits_of_the_window(
    name: str, steps: tuple[int, ...], twin: Callable[[str], Any]
) -> None:
    architecture = architecture_of(GGUFFile.open(twin(name).path))
    runner = Runner(architecture, device=CPU, attention_type="f32")
    whole = logits_of(runner, TOKENS[None], [ExactArm()], range(20))["exact"][0]
    stepper = Stepper(architecture, exact, device=CPU, attention_type="f32")
    found = [stepper.step(torch.from_numpy(piece)) for piece in np.split(TOKENS, np.cumsum(steps)[:-1])]
    assert stepper.length == 20
    assert relative(torch.cat(found), whole) < 1e-5


def test_weights_need_not_be_kept(twin: Callable[[str], Any]) -> None:
    architecture = architecture_of(GGUFFile.open(twin("llama").path))
    both = [
        Stepper(architecture, exact, device=CPU, keep_weights=keep).step(torch.from_numpy(TOKENS))
        for keep in (True, False)
    ]
    assert torch.equal(*both)


@pytest.mark.parametrize("tokens", [[], [VOCABULARY], [-1]])
def test_tokens_outside_the_vocabulary_are_refused(twin: Callable[[str], Any], tokens: list[int]) -> None:
    stepper = Stepper(architecture_of(GGUFFile.open(twin("llama").path)), exact, device=CPU)
    with pytest.raises(ModelError, match=f"all below {VOCABULARY}"):
        stepper.step(torch.tensor(tokens, dtype=torch.int64))
