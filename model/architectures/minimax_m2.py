"""`minimax-m2`: RMSNorm of q and k over all heads together; sigmoid experts with a bias that chooses."""

from __future__ import annotations

from verify.model.architectures.experts import Experts
from verify.model.architectures.feed_forward import FeedForward
from verify.model.architectures.grouped_query import GroupedQuery
from verify.model.architectures.mixture import experts_of


class MinimaxM2(GroupedQuery):
    """MiniMax-M2. Half of each head is rotated, as the file says."""

    rope_kind = "neox"
    row_norms = True

    def feed_forward_of(self, layer: int) -> FeedForward:
        experts: Experts = experts_of(
            self,
            layer,
            default_gating="sigmoid",
            normalised=True,
            scaled=False,
            default_size=self.inner(layer),
        )
        return experts
