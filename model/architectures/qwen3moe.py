"""`qwen3moe`: Qwen 3 with experts; softmax over all, the chosen ones' weights divided by their sum."""

from __future__ import annotations

from verify.model.architectures.experts import Experts
from verify.model.architectures.feed_forward import FeedForward
from verify.model.architectures.grouped_query import GroupedQuery
from verify.model.architectures.mixture import experts_of


class Qwen3Moe(GroupedQuery):
    """Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder."""

    rope_kind = "neox"
    head_norms = "required"

    def feed_forward_of(self, layer: int) -> FeedForward:
        size = self.inner(layer) // self.metadata.whole("expert_used_count")
        experts: Experts = experts_of(
            self, layer, gating="softmax", normalised=True, scaled=False, default_size=size
        )
        return experts
