"""`glm-dsa` (GLM-5), `deepseek32` (DeepSeek V3.2): latent attention to a choice of keys, by an indexer.

    score(t, s) = sum over h of w_h(t) max(q_h(t) . k(s), 0),      of the keys s <= t the top_k highest

q_h is made of the queries' latent, k of the layer's input by a layer norm, both rotated; w_h is linear in the
input. Engines rotate q and k by a Hadamard matrix too, to round them to few bits: products stay the same.
Up to `attention.indexer.top_k` keys the choice is all of them, and the layer is `deepseek2`'s to the bit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import layer_norm

from verify.model.architectures.architecture import IndexerInputs, Weights
from verify.model.architectures.deepseek2 import Deepseek2
from verify.model.architectures.feed_forward import Shapes
from verify.model.gguf.file import GGUFFile
from verify.model.products import Products
from verify.model.rope import RopeKind

# Added to the variance that the indexer's keys are divided by; files do not hold it.
INDEXER_EPS = 1e-6
# Rows whose scores are there at once.
SCORED_ROWS = 512


class Deepseek32(Deepseek2):
    """DeepSeek V3.2.

    chosen: keys that a token attends to at most; indexed: whether every layer chooses its own. Else windows
    beyond that are refused: files without the indexer's tensors, and ones whose layers share a choice.
    """

    default_gating = "sigmoid"
    multipliers_are_equal = False
    indexer_rope: RopeKind = "neox"

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        read = self.metadata
        self.chosen = read.whole("attention.indexer.top_k")
        self.indexer_heads = read.whole("attention.indexer.head_count")
        self.indexer_size = read.whole("attention.indexer.key_length", least=self.rope_size)
        # Where it is there, some layers go by the choice of an earlier one.
        shares = read.get("attention.indexer.types") is not None
        self.indexed = not shares and all(
            self.has(layer, f"indexer.{name}")
            for layer in range(self.layers)
            for name in ("attn_q_b", "attn_k", "proj", "k_norm", "k_norm.bias")
        )
        if not self.indexed:
            self.longest = self.chosen
        self.rotates_index = replace(self.rope, kind=self.indexer_rope)

    def attention_shapes(self, layer: int) -> tuple[Shapes, Shapes]:
        required, optional = super().attention_shapes(layer)
        if self.indexed:
            size, heads = self.indexer_size, self.indexer_heads
            required |= {
                "indexer.attn_q_b": (heads * size, self.query_rank or self.width),
                "indexer.attn_k": (size, self.width),
                "indexer.proj": (heads, self.width),
                "indexer.k_norm": (size,),
                "indexer.k_norm.bias": (size,),
            }
        return required, optional

    def indexer_inputs(
        self,
        layer: int,
        h: torch.Tensor,
        low: torch.Tensor,
        positions: torch.Tensor,
        weights: Weights,
        products: Products,
    ) -> IndexerInputs | None:
        if not self.indexed:
            return None
        q = products(low, weights["indexer.attn_q_b"]).unflatten(-1, (self.indexer_heads, -1))
        k = layer_norm(
            products(h, weights["indexer.attn_k"]),
            (self.indexer_size,),
            weights["indexer.k_norm"],
            weights["indexer.k_norm.bias"],
            INDEXER_EPS,
        )
        # A scale of the scores would change no choice.
        return IndexerInputs(
            self.rotates_index(q, positions),
            self.rotates_index(k[:, None], positions)[:, 0],
            products(h, weights["indexer.proj"]),
        )

    def chosen_keys(
        self, layer: int, indexer: IndexerInputs | None, kv_len: torch.Tensor
    ) -> torch.Tensor | None:
        if indexer is None or indexer.k.shape[1] <= self.chosen:
            return None
        # A window at a time: a choice depends on nothing that was computed beside it.
        windows = (
            choose(IndexerInputs(*of_window), n_kv, self.chosen)
            for *of_window, n_kv in zip(*indexer, kv_len, strict=True)
        )
        return torch.stack(list(windows))

    def _passed_over(self, name: str) -> bool:
        return (not self.indexed and ".indexer." in name) or super()._passed_over(name)


class GlmDsa(Deepseek32):
    """GLM-5: the same, but for what YaRN's multiplier would be, and which dimensions of the indexer turn."""

    reads_multiplier = False
    indexer_rope = "norm"


def choose(indexer: IndexerInputs, n_kv: torch.Tensor, most: int) -> torch.Tensor:
    """Of the first n_kv [T] keys of each token of one sequence the `most` that score highest.

    [T, most] int32, in ascending order, -1 behind them where there are fewer. Of equal scores the earlier key
    is taken.
    """
    places = torch.arange(len(indexer.k), device=n_kv.device)
    found = []
    for first in range(0, len(n_kv), SCORED_ROWS):
        rows = slice(first, first + SCORED_ROWS)
        score = torch.zeros(len(n_kv[rows]), len(places), dtype=indexer.k.dtype, device=n_kv.device)
        for h in range(indexer.q.shape[1]):
            of_head = (indexer.q[rows, h] @ indexer.k.T).clamp_(min=0)
            score += of_head.mul_(indexer.weights[rows, h, None])
        hidden = places >= n_kv[rows, None]
        best = score.masked_fill_(hidden, -torch.inf).argsort(dim=-1, descending=True, stable=True)[:, :most]
        best = best.masked_fill(best >= n_kv[rows, None], len(places)).sort(-1).values
        found.append(best.masked_fill(best == len(places), -1).to(torch.int32))
    return torch.cat(found)
