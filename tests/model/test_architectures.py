"""Every architecture against transformers' own class on the same weights, and wrong variants of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch

from support.plain_arms import ExactArm, KernelArm, logits_of, relative
from support.twins import NOPE, TWINS
from verify.model.architectures import ARCHITECTURES, architecture_of, experts
from verify.model.architectures.architecture import Architecture
from verify.model.architectures.experts import Experts
from verify.model.gguf.file import GGUFFile
from verify.model.runner import Runner

CPU = torch.device("cpu")
# transformers computes in float32 too: the two differ by the order of their sums.
AGREES = 1e-4


class Built(Protocol):
    """What the fixture `twin` gives."""

    path: Path
    tokens: np.ndarray
    expected: torch.Tensor


Twins = Callable[[str], Built]


def error(built: Built, architecture: Architecture) -> float:
    runner = Runner(architecture, device=CPU, attention_type="f32")
    return relative(logits_of(runner, built.tokens, [ExactArm()], range(24))["exact"], built.expected)


@pytest.mark.parametrize("name", TWINS)
def test_logits_are_those_of_transformers(twin: Twins, name: str) -> None:
    built = twin(name)
    assert error(built, architecture_of(GGUFFile.open(built.path))) < AGREES


@pytest.mark.parametrize("path", ["decode", "prefill"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "glm4moe", "deepseek2"])
def test_kernels_take_what_a_layer_gives(twin: Twins, name: str, path: str) -> None:
    """Sliding windows, and MLA's one KV head whose keys are longer than its values."""
    built = twin(name)
    runner = Runner(architecture_of(GGUFFile.open(built.path)), device=CPU, attention_type="f32")
    arm = KernelArm("eager:p=f32,heads=split,kv=2", path)
    found = logits_of(runner, built.tokens, [arm], range(24))[arm.name]
    assert relative(found, built.expected) < AGREES


def flipped_rope(a: Any) -> None:
    a.rope = replace(a.rope, kind="norm" if a.rope.kind == "neox" else "neox")


def whole_head_rotated(a: Any) -> None:
    a.rope = replace(a.rope, size=a.sizes.k_size)


def swapped_gate(a: Any) -> None:
    def swapped(block: Any) -> Any:
        gate = block.gate
        if isinstance(block, Experts):
            return replace(block, gate=lambda g, u: gate(u, g))
        block.gate = lambda g, u: gate(u, g)
        return block

    a.feed_forwards[:] = [swapped(block) for block in a.feed_forwards]


def no_head_norms(a: Any) -> None:
    a.head_norms = "never"


def window_off_by_one(a: Any) -> None:
    a.window += 1


def window_off_by_one_below(a: Any) -> None:
    a.window -= 1


def no_embedding_scale(a: Any) -> None:
    a.embedding_scale = 1.0


def no_linear_scaling(a: Any) -> None:
    a.rope = replace(a.rope, factor=1.0)


def linear_scaling_everywhere(a: Any) -> None:
    a.local_rope = a.rope


def no_post_norm(a: Any) -> None:
    a.post_ffn_norm = None


def scale_without_rotated_part(a: Any) -> None:
    a.scale = NOPE**-0.5


def scale_of_the_latent_head(a: Any) -> None:
    a.scale = a.sizes.k_size**-0.5


def yarn_without_its_scale(a: Any) -> None:
    a.scale = (NOPE + a.rope_size) ** -0.5


def yarn_magnitude_on_top(a: Any) -> None:
    a.rope = replace(a.rope, magnitude=1 + 0.1 * np.log(4.0))


def expert_scale_left_out(a: Any) -> None:
    a.feed_forwards[1:] = [replace(block, scale=1.0) for block in a.feed_forwards[1:]]


def shares_not_normalised(a: Any) -> None:
    a.feed_forwards[:] = [
        replace(block, normalised=False) if hasattr(block, "normalised") else block
        for block in a.feed_forwards
    ]


def other_gating(a: Any) -> None:
    flipped = {"softmax": "sigmoid", "sigmoid": "softmax"}
    a.feed_forwards[:] = [
        replace(block, gating=flipped[block.gating]) if hasattr(block, "gating") else block
        for block in a.feed_forwards
    ]


WRONG: dict[str, list[Callable[[Any], None]]] = {
    "llama": [flipped_rope, swapped_gate],
    "llama-moe": [flipped_rope, swapped_gate, shares_not_normalised, other_gating],
    "qwen2": [flipped_rope, swapped_gate],
    "qwen3": [flipped_rope, swapped_gate, no_head_norms],
    "gemma3": [
        flipped_rope,
        swapped_gate,
        no_head_norms,
        window_off_by_one,
        window_off_by_one_below,
        no_embedding_scale,
        no_linear_scaling,
        linear_scaling_everywhere,
        no_post_norm,
    ],
    "glm4": [flipped_rope, whole_head_rotated, swapped_gate, no_post_norm],
    "glm4moe": [
        flipped_rope,
        whole_head_rotated,
        swapped_gate,
        no_head_norms,
        expert_scale_left_out,
        shares_not_normalised,
        other_gating,
    ],
    "deepseek2": [flipped_rope, scale_without_rotated_part, scale_of_the_latent_head, other_gating],
    "deepseek2-yarn": [yarn_without_its_scale, yarn_magnitude_on_top],
}


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        pytest.param(name, spoil, id=f"{name}-{spoil.__name__}")
        for name, all_ in WRONG.items()
        for spoil in all_
    ],
)
def test_wrong_variants_are_seen(twin: Twins, name: str, spoil: Callable[[Any], None]) -> None:
    built = twin(name)
    file = GGUFFile.open(built.path)
    architecture = ARCHITECTURES[file.architecture](file)
    spoil(architecture)
    assert error(built, architecture) > 3 * AGREES


@pytest.mark.parametrize("name", ["glm4moe", "deepseek2"])
def test_biased_scores_as_weights_are_seen(twin: Twins, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = twin(name)

    def biased(
        logits: torch.Tensor, bias: torch.Tensor, *, used: int, scale: float, **_: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values, chosen = (logits.sigmoid() + bias).topk(used)
        return chosen, values / values.sum(-1, keepdim=True) * scale

    monkeypatch.setattr(experts, "route", biased)
    assert error(built, architecture_of(GGUFFile.open(built.path))) > 3 * AGREES


@pytest.mark.parametrize("name", ["llama-moe", "glm4moe", "deepseek2"])
def test_neither_group_nor_other_arms_change_a_bit(twin: Twins, name: str) -> None:
    built = twin(name)
    tokens = built.tokens
    runner = Runner(architecture_of(GGUFFile.open(built.path)), device=CPU)
    together = logits_of(runner, tokens, [ExactArm("a"), ExactArm("b")], range(24))
    assert torch.equal(together["a"], together["b"])
    for w in range(2):
        alone = logits_of(runner, tokens[w : w + 1], [ExactArm("a")], range(24))
        assert torch.equal(alone["a"][0], together["a"][w])
