"""`glm-dsa` (GLM-5), `deepseek32` (DeepSeek V3.2): latent attention to a choice of keys, by an indexer.

Up to `attention.indexer.top_k` keys the choice is all of them, and the layer is `deepseek2`'s to the bit:
that much runs here. Longer windows are refused.
"""

from __future__ import annotations

from verify.model.architectures.deepseek2 import Deepseek2
from verify.model.gguf.file import GGUFFile


class Deepseek32(Deepseek2):
    """DeepSeek V3.2."""

    default_gating = "sigmoid"
    multipliers_are_equal = False
    without_effect = frozenset(
        {
            "attention.indexer.head_count",
            "attention.indexer.key_length",
            "attention.indexer.types",
        }
    )

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        self.longest = self.metadata.whole("attention.indexer.top_k")

    def _passed_over(self, name: str) -> bool:
        return ".indexer." in name or super()._passed_over(name)


class GlmDsa(Deepseek32):
    """GLM-5: the same, but for what YaRN's multiplier would be."""

    reads_multiplier = False
