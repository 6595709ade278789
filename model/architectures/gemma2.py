"""`gemma2`: softcaps on the attention's logits and on the model's; every second layer sees a window."""

from __future__ import annotations

from dataclasses import replace

from verify.model.architectures.architecture import AttentionSettings
from verify.model.architectures.feed_forward import Dense, FeedForward
from verify.model.architectures.grouped_query import GroupedQuery
from verify.model.blocks import geglu
from verify.model.gguf.file import GGUFFile
from verify.model.rope import Rope

# Where the file does not say.
SOFTCAP, FINAL_SOFTCAP, WINDOW, PERIOD = 50.0, 30.0, 4096, 2
# The 27B model takes its scale from the width of a head in the residual stream rather than from its size.
LARGEST_LAYERS = 46


class Gemma2(GroupedQuery):
    """Gemma 2. The file's norm weights already hold the one that the model adds to them."""

    rope_kind = "neox"
    post_attention_norm = "post_attention_norm"
    post_ffn_norm = "post_ffw_norm"

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        read = self.metadata
        self.embedding_scale = self.width**0.5
        self.softcap = read.number("attn_logit_softcapping", SOFTCAP) or None
        self.final_softcap = read.number("final_logit_softcapping", FINAL_SOFTCAP) or None
        self.window = read.whole("attention.sliding_window", WINDOW, least=0) or None
        self.local = read.windowed("attention.sliding_window_pattern", self.blocks, PERIOD)
        self.local_rope = self.local_rope_of(self.rope, scaled=True)
        # llama.cpp takes the first layer's number for all.
        if self.is_local(0):
            self.rope = replace(self.rope, size=self.local_rope.size)

    def feed_forward_of(self, layer: int) -> FeedForward:
        return Dense(self.width, self.inner(layer), gate=geglu)

    def rope_of_layer(self, layer: int) -> Rope:
        return self.local_rope if self.is_local(layer) else self.rope

    def attention_settings(self, layer: int) -> AttentionSettings:
        size = self.k_sizes[layer]
        if self.blocks == LARGEST_LAYERS:
            size = self.width // self.heads[0]
        return AttentionSettings(size**-0.5, self.window if self.is_local(layer) else None, self.softcap)

    def is_local(self, layer: int) -> bool:
        return self.window is not None and self.local[layer]
