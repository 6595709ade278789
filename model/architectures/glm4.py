"""`glm4`: NORM rotation of half of each head, norms before and after both branches, gate and up in one."""

from __future__ import annotations

from dataclasses import replace

from verify.model.architectures.feed_forward import Dense, FeedForward
from verify.model.architectures.grouped_query import GroupedQuery, check_sections
from verify.model.rope import Rope


class Glm4(GroupedQuery):
    """GLM-4-0414, dense."""

    rope_kind = "norm"
    post_attention_norm = "post_attention_norm"
    post_ffn_norm = "post_ffw_norm"

    def read_rope(self, head_size: int) -> Rope:
        rope = super().read_rope(head_size)
        # The converter of the models that see pictures stores q and k for NEOX.
        return replace(rope, kind="neox") if check_sections(self, rope.size // 2) else rope

    def feed_forward_of(self, layer: int) -> FeedForward:
        return Dense(self.width, self.inner(layer), fused=True)
