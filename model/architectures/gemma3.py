"""`gemma3`: five layers of six see a sliding window; norms before and after both branches; GELU gates."""

from __future__ import annotations

from dataclasses import replace

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
        read = self.metadata
        self.final_softcap = read.number("final_logit_softcapping", 0.0) or None
        self.window = read.whole("attention.sliding_window", 0, least=0) or None
        self.local = read.windowed("attention.sliding_window_pattern", self.blocks, GLOBAL_EVERY)
        local_base = read.number("rope.freq_base_swa", LOCAL_BASE)
        local_size = read.whole("rope.dimension_count_swa", self.rope.size)
        # llama.cpp takes the first layer's number for all.
        if self.is_local(0):
            self.rope = replace(self.rope, size=local_size)
        # Scaling applies to the layers that see all keys; the plain factor to all.
        attn_factor = read.number("rope.scaling.attn_factor", 1.0)
        self.local_rope = Rope(self.rope_kind, local_size, local_base, magnitude=attn_factor)

    def feed_forward_of(self, layer: int) -> FeedForward:
        return Dense(self.width, self.inner(layer), gate=geglu)

    def rope_of_layer(self, layer: int) -> Rope:
        return self.local_rope if self.is_local(layer) else self.rope

    def attention_settings(self, layer: int) -> AttentionSettings:
        size = self.sizes.k_size
        if self.blocks == LARGEST_LAYERS:
            size = self.width // self.sizes.heads
        return AttentionSettings(size**-0.5, self.window if self.is_local(layer) else None)

    def is_local(self, layer: int) -> bool:
        return self.window is not None and self.local[layer]
