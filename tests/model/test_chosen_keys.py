"""Layers that attend to a choice of keys: what is chosen, and that both drivers choose alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from support.plain_arms import ExactArm, KernelArm, logits_of, relative
from support.tiny_files import TOKENS
from support.tiny_models import TINY
from verify.model.architectures import architecture_of
from verify.model.architectures.architecture import Architecture, IndexerInputs
from verify.model.architectures.glm_dsa import SCORED_ROWS, choose
from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile
from verify.model.runner import Runner
from verify.model.steps import Stepper

CPU = torch.device("cpu")


def plain(inputs: IndexerInputs, n_kv: torch.Tensor, most: int) -> list[list[int]]:
    """A row and a key at a time."""
    q, k, w = (x.double().numpy() for x in inputs)
    found = []
    for t, n in enumerate(n_kv.tolist()):
        scores = [sum(w[t, h] * max(q[t, h] @ k[s], 0.0) for h in range(q.shape[1])) for s in range(n)]
        best = sorted(sorted(range(n), key=lambda s: -scores[s])[:most])
        found.append(best + [-1] * (most - len(best)))
    return found


@pytest.mark.parametrize("most", [1, 5, 30])
def test_the_highest_scores_are_chosen(most: int) -> None:
    draw = torch.Generator().manual_seed(1)
    # Whole numbers, of which every sum is exact, and many are equal.
    q, k, w = (torch.randint(-2, 3, size, generator=draw).float() for size in ((40, 3, 4), (40, 4), (40, 3)))
    n_kv = torch.randint(0, 41, (40,), generator=draw, dtype=torch.int32)
    inputs = IndexerInputs(q, k, w)
    assert choose(inputs, n_kv, most).tolist() == plain(inputs, n_kv, most)


def test_rows_of_many_are_chosen_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(2)
    inputs = IndexerInputs(*(torch.randn(size, generator=draw) for size in ((90, 2, 8), (90, 8), (90, 2))))
    n_kv = torch.arange(1, 91, dtype=torch.int32)
    whole = choose(inputs, n_kv, 7)
    assert SCORED_ROWS > 90
    monkeypatch.setattr("verify.model.architectures.glm_dsa.SCORED_ROWS", 32)
    assert torch.equal(choose(inputs, n_kv, 7), whole)


def opened(folder: Path, name: str) -> Architecture:
    return architecture_of(GGUFFile.open(TINY[name].write(folder / "tiny.gguf")))


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("deepseek32-chosen", (40,)),
        ("deepseek32-chosen", (33, *(1,) * 7)),
        ("glm-dsa-chosen-yarn", (17, 1, 22)),
    ],
    ids=["at once", "one by one", "pieces"],
)
def test_steps_choose_as_whole_windows_do(tmp_path: Path, name: str, steps: tuple[int, ...]) -> None:
    architecture = opened(tmp_path, name)
    whole = logits_of(
        Runner(architecture, device=CPU, attention_type="f32"), TOKENS[None], [ExactArm()], range(40)
    )["exact"][0]
    stepper = Stepper(architecture, [ExactArm()], device=CPU, attention_type="f32")
    pieces = np.split(TOKENS, np.cumsum(steps)[:-1])
    found = torch.cat([stepper.step(torch.from_numpy(piece))["exact"] for piece in pieces])
    assert relative(found, whole) < 1e-5
    # A branch goes on with the indexer's keys too.
    more = torch.arange(3)
    branch = stepper.branch(ExactArm("other"), after="exact").step(more)["other"]
    assert torch.equal(branch, stepper.step(more)["exact"])


def test_rows_behind_a_prompt_choose_among_its_keys(tmp_path: Path) -> None:
    architecture = opened(tmp_path, "deepseek32-chosen")
    runner = Runner(architecture, device=CPU, attention_type="f32")
    whole = logits_of(runner, TOKENS[None], [ExactArm()], range(30, 40))["exact"]
    behind = logits_of(runner, TOKENS[None], [ExactArm()], range(30, 40), prompt=ExactArm("prompt"))["exact"]
    assert relative(behind, whole) < 1e-5


def test_windows_choose_by_themselves(tmp_path: Path) -> None:
    architecture = opened(tmp_path, "deepseek32-chosen")
    runner = Runner(architecture, device=CPU, attention_type="f32")
    both = logits_of(runner, np.stack((TOKENS[::-1], TOKENS)), [ExactArm()], range(40))["exact"]
    alone = logits_of(runner, TOKENS[None], [ExactArm()], range(40))["exact"]
    assert torch.equal(both[1], alone[0])


@pytest.mark.parametrize("path", ["decode", "prefill"])
def test_a_kernel_is_given_the_list(tmp_path: Path, path: str) -> None:
    runner = Runner(opened(tmp_path, "deepseek32-chosen"), device=CPU, attention_type="f32")
    arms = [ExactArm(), KernelArm("eager", path)]
    found = logits_of(runner, TOKENS[None], arms, range(40))
    # It keeps P in float16; another choice of keys is off by as much as the logits are.
    assert 0 < relative(found[arms[1].name], found["exact"]) < 1e-3


def test_layers_that_share_a_choice_are_refused_beyond_it(tmp_path: Path) -> None:
    file = TINY["glm-dsa-chosen"].with_({"attention.indexer.types": ["full", "shared"]})
    runner = Runner(architecture_of(GGUFFile.open(file.write(tmp_path / "tiny.gguf"))), device=CPU)
    with pytest.raises(ModelError, match="40 tokens: from 8 keys on"):
        logits_of(runner, TOKENS[None], [ExactArm()], range(40))
    logits_of(runner, TOKENS[None, :8], [ExactArm()], range(8))
