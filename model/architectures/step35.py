"""`step35`: layers with a window have other head counts and rotations; a gate a head; clamped SwiGLU.

out of head h = sigmoid(g_h . x) * attention of head h
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from verify.model.architectures.architecture import AttentionSettings, Weights
from verify.model.architectures.experts import Experts
from verify.model.architectures.feed_forward import Dense, FeedForward, Shapes
from verify.model.architectures.grouped_query import GroupedQuery
from verify.model.architectures.mixture import experts_of
from verify.model.blocks import Gate, clamped_swiglu, rms_norm, swiglu
from verify.model.gguf.dequantize import dequantize
from verify.model.gguf.file import GGUFFile
from verify.model.products import Products
from verify.model.rope import Rope

_FREQUENCIES = "rope_freqs.weight"
# A limit below this stands for none.
_LEAST_LIMIT = 1e-6


class Step35(GroupedQuery):
    """Step-3.5-Flash. Layers that see all keys rotate half of what the file says, by its divisors if any."""

    rope_kind = "neox"
    head_norms = "optional"

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        read = self.metadata
        self.window = read.whole("attention.sliding_window", least=0) or None
        self.local = read.windowed("attention.sliding_window_pattern", self.blocks)
        self.local_rope = self.local_rope_of(replace(self.rope, divisors=None), scaled=False)
        self.rope = replace(self.rope, size=self.rope.size // 2)
        if self.rope.divisors is not None:
            self.rope = replace(self.rope, divisors=self.rope.divisors[: self.rope.size // 2])

    def read_rope(self, head_size: int) -> Rope:
        rope = super().read_rope(head_size)
        if _FREQUENCIES not in self.file.tensors:
            return rope
        return replace(rope, divisors=dequantize(self.file, _FREQUENCIES).flatten())

    @property
    def global_tensors(self) -> Shapes:
        return {_FREQUENCIES: (max(self.rope.size, self.local_rope.size) // 2,)}

    def feed_forward_of(self, layer: int) -> FeedForward:
        shared_gate = self._gate("swiglu_clamp_shexp", layer)
        if not self.has(layer, "ffn_gate_inp"):
            return Dense(self.width, self.inner(layer), gate=shared_gate)
        experts: Experts = experts_of(
            self,
            layer,
            default_gating="sigmoid",
            gate=self._gate("swiglu_clamp_exp", layer),
            shared_gate=shared_gate,
        )
        return experts

    def _gate(self, key: str, layer: int) -> Gate:
        limit = self.metadata.numbers_per_layer(key, self.blocks, 0.0)[layer]
        return partial(clamped_swiglu, limit=limit) if limit > _LEAST_LIMIT else swiglu

    def attention_shapes(self, layer: int) -> tuple[Shapes, Shapes]:
        required, optional = super().attention_shapes(layer)
        return required, optional | {"attn_gate": (self.heads[layer], self.width)}

    def attention_gate(
        self, layer: int, x: torch.Tensor, weights: Weights, products: Products
    ) -> torch.Tensor | None:
        if "attn_gate" not in weights:
            return None
        h = rms_norm(x, weights["attn_norm"], self.eps)
        return products(h, weights["attn_gate"]).sigmoid()[..., None]

    def rope_of_layer(self, layer: int) -> Rope:
        return self.local_rope if self.is_local(layer) else self.rope

    def attention_settings(self, layer: int) -> AttentionSettings:
        return AttentionSettings(self.k_sizes[layer] ** -0.5, self.window if self.is_local(layer) else None)

    def is_local(self, layer: int) -> bool:
        return self.window is not None and self.local[layer]
