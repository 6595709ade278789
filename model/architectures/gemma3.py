"""`gemma3`: five layers of six see a sliding window; norms before and after both branches; GELU gates."""

from __future__ import annotations

from verify.model.architectures.architecture import AttentionSettings
from verify.model.architectures.feed_forward import Dense, FeedForward
from verify.model.architectures.grouped_query import GroupedQuery
from verify.model.blocks import geglu
from verify.model.gguf.file import GGUFFile
from verify.model.rope import Rope

# Every so many layers there is one that sees all keys.
GLOBAL_EVERY = 6
LOCAL_BASE = 10000.0
# The 27B model takes its scale from the width of a head in the residual stream rather than from its size.
LARGEST_LAYERS = 62


class Gemma3(GroupedQuery):
    """Gemma 3's text model. The file's norm weights already hold the one that the model adds to them."""

    rope_kind = "neox"
    head_norms = "required"
    post_attention_norm = "post_attention_norm"
    post_ffn_norm = "post_ffw_norm"

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        self.embedding_scale = self.width**0.5
        self.window = self.metadata.whole("attention.sliding_window")
        local_base = self.metadata.number("rope.freq_base_swa", LOCAL_BASE)
        # Scaling applies to the layers that see all keys.
        self.local_rope = Rope(self.rope_kind, self.rope.size, local_base)

    def feed_forward_of(self, layer: int) -> FeedForward:
        return Dense(self.width, self.inner(layer), gate=geglu)

    def rope_of_layer(self, layer: int) -> Rope:
        return self.local_rope if self.is_local(layer) else self.rope

    def attention_settings(self, layer: int) -> AttentionSettings:
        size = self.sizes.k_size
        if self.blocks == LARGEST_LAYERS:
            size = self.width // self.sizes.heads
        return AttentionSettings(size**-0.5, self.window if self.is_local(layer) else None)

    @staticmethod
    def is_local(layer: int) -> bool:
        return (layer + 1) % GLOBAL_EVERY != 0
