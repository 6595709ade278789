"""`gpt-oss`: a sink a head, a window in every second layer, biases everywhere, experts with a clamped SwiGLU.

Each query head has a learned logit of a key whose value is 0: it takes its share of the softmax and gives
nothing. The experts' weights are the softmax of the chosen ones' logits.
"""

from __future__ import annotations

from verify.model.architectures.architecture import AttentionSettings
from verify.model.architectures.experts import Experts
from verify.model.architectures.feed_forward import FeedForward, Shapes
from verify.model.architectures.grouped_query import GroupedQuery
from verify.model.architectures.mixture import experts_of
from verify.model.blocks import clamped_swiglu_plus_one
from verify.model.gguf.file import GGUFFile
from verify.model.rope import Rope

# Of so many layers the last sees all keys.
PERIOD = 2


class GptOss(GroupedQuery):
    """gpt-oss-20b and gpt-oss-120b."""

    rope_kind = "neox"
    output_bias = True
    ffn_norm = "post_attention_norm"

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        read = self.metadata
        self.window = read.whole("attention.sliding_window", least=0) or None
        self.local = read.windowed("attention.sliding_window_pattern", self.blocks, PERIOD)
        self.local_rope = self.local_rope_of(self.rope, scaled=True)
        self.sinks = [self.per_head(layer, "attn_sinks") for layer in range(self.layers)]

    def feed_forward_of(self, layer: int) -> FeedForward:
        experts: Experts = experts_of(
            self,
            layer,
            gating="softmax of the chosen",
            normalised=False,
            scaled=False,
            gate=clamped_swiglu_plus_one,
            biases=True,
        )
        return experts

    def attention_shapes(self, layer: int) -> tuple[Shapes, Shapes]:
        required, optional = super().attention_shapes(layer)
        return required | {"attn_sinks": (self.heads[layer],)}, optional

    def rope_of_layer(self, layer: int) -> Rope:
        return self.local_rope if self.is_local(layer) else self.rope

    def attention_settings(self, layer: int) -> AttentionSettings:
        window = self.window if self.is_local(layer) else None
        return AttentionSettings(self.k_sizes[layer] ** -0.5, window, sinks=self.sinks[layer])

    def is_local(self, layer: int) -> bool:
        return self.window is not None and self.local[layer]
