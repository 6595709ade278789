"""`glm4`: NORM rotation of half of each head, norms before and after both branches, gate and up in one."""

from __future__ import annotations

from verify.model.architectures.feed_forward import Dense, FeedForward
from verify.model.architectures.grouped_query import GroupedQuery


class Glm4(GroupedQuery):
    """GLM-4-0414, dense."""

    rope_kind = "norm"
    rotated = 0.5
    biases = "optional"
    fused_qkv = True
    post_attention_norm = "post_attention_norm"
    post_ffn_norm = "post_ffw_norm"

    def feed_forward_of(self, layer: int) -> FeedForward:
        return Dense(self.width, self.inner(layer), fused=True)
