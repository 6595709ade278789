"""`llama`: SmolLM2, Llama 2 and 3, Mistral, and with experts Mixtral."""

from __future__ import annotations

from dataclasses import replace

from verify.model.architectures.experts import Experts
from verify.model.architectures.feed_forward import Dense, FeedForward, Shapes
from verify.model.architectures.grouped_query import GroupedQuery
from verify.model.architectures.mixture import experts_of
from verify.model.gguf.dequantize import dequantize
from verify.model.rope import Rope

_FREQUENCIES = "rope_freqs.weight"


class Llama(GroupedQuery):
    """Rows of q and k are stored permuted for NORM rotation.

    Llama 3's rotary scaling stands in the file only as `rope_freqs`, by which frequencies are divided.
    Experts: softmax over all of them, the chosen ones' weights divided by their sum.
    """

    rope_kind = "norm"
    output_bias = True

    def feed_forward_of(self, layer: int) -> FeedForward:
        if not self.metadata.whole("expert_count", 0, least=0):
            biases = [n for n in ("ffn_gate", "ffn_up", "ffn_down") if self.has(layer, f"{n}.bias")]
            return Dense(self.width, self.inner(layer), biases=biases)
        experts: Experts = experts_of(
            self, layer, gating="softmax", normalised=True, scaled=False, default_size=self.inner(layer)
        )
        return experts

    def plain_rope(self, head_size: int) -> Rope:
        """The rotation without the file's divisors."""
        return super().read_rope(head_size)

    def read_rope(self, head_size: int) -> Rope:
        rope = self.plain_rope(head_size)
        if _FREQUENCIES not in self.file.tensors:
            return rope
        self.expect_shape(_FREQUENCIES, (rope.size // 2,))
        return replace(rope, divisors=dequantize(self.file, _FREQUENCIES))

    @property
    def global_tensors(self) -> Shapes:
        return {_FREQUENCIES: (self.rope.size // 2,)}
