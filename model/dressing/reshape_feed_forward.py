"""A dense feed-forward rewritten as experts that compute the same function.

shared   the shared expert is the feed-forward; the routed experts are chosen as the router likes and their
         down projection is zero
cancel   every expert is the feed-forward and all of them are chosen: the weights differ and sum to one
halves   two experts hold half of the inner dimension each, two others hold noise. The router alone would
         choose the noise now and then; the bias makes it choose the halves. Their scores are 1/2 each, so
         that the weights are one each at a scale of 2, and with the (unequal) biases in them they are not.
clamped  two experts hold half of the inner dimension each and have the same weight, for gpt-oss's gate
         g sigmoid(1.702 g) (u + 1), clamped at 7: g = gate/1.702, u = up/64 - 1, and down takes the rest;
         the same function where no gate is above 11.9
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from verify.model.blocks import OSS_ALPHA
from verify.model.errors import ModelError

Experts = Literal["dense", "shared", "cancel", "halves", "clamped"]
FORMS: tuple[Experts, ...] = ("dense", "shared", "cancel", "halves", "clamped")
# What the up projection is divided by, so that the clamp lies far outside of it.
CLAMPED_UP = 64.0
# Inner dimension of the routed experts beside a shared one that does the work.
IDLE_SIZE = 32
HALVES_BIAS = (0.0, 1.0, 0.0, 2.0)


@dataclass
class ExpertLayer:
    """Tensors of a layer, and what the metadata must say."""

    tensors: dict[str, torch.Tensor]  # short name with its suffix -> values
    experts: int  # number of them
    used: int  # by a token
    size: int  # inner dimension of one
    scale: float = 1.0  # of their shares
    shared: int = 0  # shared experts, stored as one of `shared` times `size`


def expert_layer(
    form: Experts, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, seed: int
) -> ExpertLayer:
    """gate and up [F, E], down [E, F] as experts of one layer, in float32."""
    generator = torch.Generator().manual_seed(seed)
    inner, width = gate.shape

    def noise(*shape: int, like: torch.Tensor | None = None) -> torch.Tensor:
        size = 0.3 if like is None else float(like.square().mean().sqrt())
        return torch.randn(shape, generator=generator) * size

    def between_noise(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """[4, *]: noise, the first half, noise, the second half."""
        return torch.stack((noise(*first.shape, like=first), first, noise(*first.shape, like=first), second))

    if form == "shared":
        tensors = {
            "ffn_gate_shexp.weight": gate,
            "ffn_up_shexp.weight": up,
            "ffn_down_shexp.weight": down,
            "ffn_gate_exps.weight": noise(4, IDLE_SIZE, width, like=gate),
            "ffn_up_exps.weight": noise(4, IDLE_SIZE, width, like=up),
            "ffn_down_exps.weight": torch.zeros(4, width, IDLE_SIZE),
            "ffn_gate_inp.weight": noise(4, width),
            "exp_probs_b.bias": torch.zeros(4),
        }
        if inner % IDLE_SIZE:
            raise ModelError(f"feed_forward_length: {inner}, expected a multiple of {IDLE_SIZE}")
        return ExpertLayer(tensors, 4, 2, IDLE_SIZE, shared=inner // IDLE_SIZE)
    if form == "cancel":
        tensors = {
            "ffn_gate_exps.weight": gate.repeat(2, 1, 1),
            "ffn_up_exps.weight": up.repeat(2, 1, 1),
            "ffn_down_exps.weight": down.repeat(2, 1, 1),
            "ffn_gate_inp.weight": noise(2, width),
            "exp_probs_b.bias": noise(2),
        }
        return ExpertLayer(tensors, 2, 2, inner)
    half = inner // 2
    if form == "clamped":
        parts = (slice(0, half), slice(half, inner))
        tensors = {
            "ffn_gate_exps.weight": torch.stack([gate[part] for part in parts]) / OSS_ALPHA,
            "ffn_up_exps.weight": torch.stack([up[part] for part in parts]) / CLAMPED_UP,
            # Two experts of weight 1/2.
            "ffn_down_exps.weight": torch.stack([down[:, part] for part in parts])
            * 2
            * OSS_ALPHA
            * CLAMPED_UP,
            "ffn_gate_inp.weight": torch.zeros(2, width),
            "ffn_gate_inp.bias": torch.zeros(2),
            "ffn_gate_exps.bias": torch.zeros(2, half),
            "ffn_up_exps.bias": -torch.ones(2, half),
            "ffn_down_exps.bias": torch.zeros(2, width),
        }
        return ExpertLayer(tensors, 2, 2, half)
    router = noise(4, width)
    router[1::2] = 0.0
    tensors = {
        "ffn_gate_exps.weight": between_noise(gate[:half], gate[half:]),
        "ffn_up_exps.weight": between_noise(up[:half], up[half:]),
        "ffn_down_exps.weight": between_noise(down[:, :half], down[:, half:]),
        "ffn_gate_inp.weight": router,
        "exp_probs_b.bias": torch.tensor(HALVES_BIAS),
    }
    return ExpertLayer(tensors, 4, 2, half, scale=2.0)
