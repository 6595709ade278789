"""`glm4moe`: NEOX rotation of half of each head, experts with sigmoid scores and a bias that only chooses."""

from __future__ import annotations

from verify.model.architectures.experts import Experts
from verify.model.architectures.feed_forward import Dense, FeedForward
from verify.model.architectures.grouped_query import GroupedQuery, check_sections
from verify.model.architectures.mixture import experts_of
from verify.model.rope import Rope


class Glm4Moe(GroupedQuery):
    """GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7. The norm before the feed-forward is `post_attention_norm`."""

    rope_kind = "neox"
    head_norms = "optional"
    ffn_norm = "post_attention_norm"

    def read_rope(self, head_size: int) -> Rope:
        rope = super().read_rope(head_size)
        check_sections(self, rope.size // 2)
        return rope

    def feed_forward_of(self, layer: int) -> FeedForward:
        if layer < self.metadata.whole("leading_dense_block_count", 0, least=0):
            return Dense(self.width, self.inner(layer))
        experts: Experts = experts_of(self, layer, default_gating="sigmoid")
        return experts
