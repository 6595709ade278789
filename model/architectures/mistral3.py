"""`mistral3`: Mistral Small 3 and Ministral: llama with queries scaled by their position, and YaRN."""

from __future__ import annotations

from dataclasses import replace

import torch

from verify.model.architectures.architecture import AttentionInputs, Weights
from verify.model.architectures.grouped_query import rope_of
from verify.model.architectures.llama import Llama
from verify.model.architectures.temperature import temperature_of
from verify.model.gguf.file import GGUFFile
from verify.model.products import Products
from verify.model.rope import Rope


class Mistral3(Llama):
    """Otherwise `llama`."""

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        self.temperature = temperature_of(self, has_length=False)

    def plain_rope(self, head_size: int) -> Rope:
        multiplier = self.metadata.number("rope.scaling.yarn_log_multiplier", 0.0)
        rope = rope_of(
            self, head_size, self.rope_kind, default_size=head_size, log_multiplier=0.1 * multiplier
        )
        return replace(
            rope,
            beta_fast=self.metadata.number("rope.scaling.yarn_beta_fast", rope.beta_fast),
            beta_slow=self.metadata.number("rope.scaling.yarn_beta_slow", rope.beta_slow),
        )

    def attention_inputs(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, weights: Weights, products: Products
    ) -> AttentionInputs:
        inputs = super().attention_inputs(layer, x, positions, weights, products)
        if self.temperature is None:
            return inputs
        return inputs._replace(q=inputs.q * self.temperature(positions).to(inputs.q.dtype)[:, None, None])
