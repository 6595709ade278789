"""`deepseek2`: multi-head latent attention (MLA); DeepSeek V2 and V3, GLM-4.7-Flash.

    c = rms(latent part of kv_a x) [512], r = rope(the rest) [64];  of each head q = [q_nope | q_rope]
    score = q_nope . (k_b^T c) + q_rope . r = (k_b q_nope) . c + q_rope . r
    out   = v_b (sum of p c)

so that one KV head with K = [r | c] and V = c serves all query heads ("absorbed", as engines run it).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from verify.kernels.heads import Heads
from verify.model.architectures.architecture import (
    Architecture,
    AttentionInputs,
    AttentionSettings,
    IndexerInputs,
    ModelSizes,
    Weights,
)
from verify.model.architectures.experts import Experts, Gating
from verify.model.architectures.feed_forward import Dense, FeedForward, Shapes
from verify.model.architectures.grouped_query import rope_of
from verify.model.architectures.mixture import experts_of
from verify.model.architectures.temperature import temperature_of
from verify.model.blocks import rms_norm
from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile
from verify.model.products import Products

# Block counts and vocabulary of GLM-4.7-Flash, whose files may leave the gating function out.
_FLASH_BLOCKS, _FLASH_VOCABULARY = (47, 48), 154880


class Deepseek2(Architecture):
    """Both layouts of files: with `attn_k_b` and `attn_v_b`, and the older one with `attn_kv_b`.

    multipliers_are_equal: whether YaRN's other multiplier, which files do not hold, is taken to be
    `yarn_log_multiplier` too, and not 0.1. nope, rope_size, value: sizes of a head's parts before absorption;
    latent: kv_lora_rank.
    """

    multipliers_are_equal = True
    reads_multiplier = True
    default_gating: Gating = "softmax"

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        read = self.metadata
        self.heads = read.whole("attention.head_count")
        read.get("attention.head_count_kv")
        self.latent = read.whole("attention.kv_lora_rank")
        self.query_rank = read.whole("attention.q_lora_rank", 0, least=0)
        self.rope_size = read.whole("rope.dimension_count")
        newer = read.get("attention.key_length_mla") is not None
        suffix = "_mla" if newer else ""
        head = read.whole(f"attention.key_length{suffix}")
        self.value = read.whole(f"attention.value_length{suffix}")
        self.nope = head - self.rope_size
        if self.nope < 1:
            raise ModelError(
                f"{file.path}: metadata key {read.name(f'attention.key_length{suffix}')} is {head},"
                f" expected more than the {self.rope_size} rotated dimensions"
            )
        self.sizes = ModelSizes(
            layers=self.layers,
            width=self.width,
            attention=Heads(self.heads, 1, self.rope_size + self.latent, self.latent),
            vocabulary=self.vocabulary,
            context=read.whole("context_length"),
        )
        if newer:
            for key, expected in (("key_length", self.sizes.k_size), ("value_length", self.latent)):
                found = read.whole(f"attention.{key}", expected)
                if found != expected:
                    raise ModelError(
                        f"{file.path}: metadata key {read.name(f'attention.{key}')} is {found},"
                        f" expected {expected}, the latent head"
                    )
        self._read_rope(head)
        self.feed_forwards = [self.feed_forward_of(layer) for layer in range(self.layers)]

    def _read_rope(self, head: int) -> None:
        """Rotation and scale, as llama.cpp has them.

        With m = attn_factor (1 + 0.1 ln f)(1 + c ln f), f the factor of any scaling and c
        `yarn_log_multiplier`, the scale is m^2 / sqrt(head). YaRN with c moves its factor 1 + 0.1 ln f from
        the rotation to the scale: the two multipliers are equal in the published models, and cancel there.
        """
        read = self.metadata
        multiplier = read.number("rope.scaling.yarn_log_multiplier", 0.0) if self.reads_multiplier else 0.0
        self.rope = rope_of(self, self.rope_size, "norm", default_size=self.rope_size)
        attn_factor = read.number("rope.scaling.attn_factor", 1.0)
        log_factor = math.log(self.rope.factor)
        m = attn_factor * (1 + multiplier * log_factor)
        if self.rope.original_context is None or not multiplier:
            m *= 1 + 0.1 * log_factor
        elif self.multipliers_are_equal:
            self.rope = replace(self.rope, magnitude=attn_factor)
        else:
            ratio = (1 + 0.1 * log_factor) / (1 + multiplier * log_factor)
            m *= ratio
            self.rope = replace(self.rope, magnitude=attn_factor * ratio)
        self.scale = m * m * head**-0.5
        self.temperature = temperature_of(self)

    def feed_forward_of(self, layer: int) -> FeedForward:
        read = self.metadata
        if layer < read.whole("leading_dense_block_count", 0, least=0) or not read.whole(
            "expert_count", 0, least=0
        ):
            return Dense(self.width, read.per_layer("feed_forward_length", self.blocks)[layer])
        flash = self.blocks in _FLASH_BLOCKS and self.vocabulary == _FLASH_VOCABULARY
        gating: Gating = "sigmoid" if flash else self.default_gating
        experts: Experts = experts_of(self, layer, default_gating=gating)
        return experts

    def attention_settings(self, layer: int) -> AttentionSettings:
        return AttentionSettings(self.scale)

    def attention_shapes(self, layer: int) -> tuple[Shapes, Shapes]:
        heads, width, latent = self.heads, self.width, self.latent
        q_rows = heads * (self.nope + self.rope_size)
        required: Shapes = {
            "attn_kv_a_mqa": (latent + self.rope_size, width),
            "attn_kv_a_norm": (latent,),
            "attn_output": (width, heads * self.value),
        }
        if self.query_rank:
            required["attn_q_a"] = (self.query_rank, width)
            required["attn_q_a_norm"] = (self.query_rank,)
            required["attn_q_b"] = (q_rows, self.query_rank)
        else:
            required["attn_q"] = (q_rows, width)
        if self.has(layer, "attn_kv_b") and self.has(layer, "attn_k_b"):
            # The same weights twice, these as matrices: what ik_llama.cpp's converter writes.
            required["attn_k_b"] = (heads * latent, self.nope)
            required["attn_v_b"] = (heads * self.value, latent)
        elif self.has(layer, "attn_kv_b"):
            required["attn_kv_b"] = (heads * (self.nope + self.value), latent)
        else:
            required["attn_k_b"] = (heads, latent, self.nope)
            required["attn_v_b"] = (heads, self.value, latent)
        return required, {}

    def attention_inputs(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, weights: Weights, products: Products
    ) -> AttentionInputs:
        h = rms_norm(x, weights["attn_norm"], self.eps)
        if self.query_rank:
            low = rms_norm(products(h, weights["attn_q_a"]), weights["attn_q_a_norm"], self.eps)
            q = products(low, weights["attn_q_b"])
        else:
            low, q = h, products(h, weights["attn_q"])
        q = q.view(len(x), self.heads, self.nope + self.rope_size)
        q_nope, q_rope = q.split([self.nope, self.rope_size], -1)
        k_b = self._k_b(weights)
        absorbed = torch.stack([products(q_nope[:, i], k_b[i]) for i in range(self.heads)], 1)
        kv = products(h, weights["attn_kv_a_mqa"])
        latent = rms_norm(kv[:, : self.latent], weights["attn_kv_a_norm"], self.eps)[:, None]
        k_rope = self.rope(kv[:, None, self.latent :], positions)
        # The latent part comes first, as everywhere in this project: V is the first v_size numbers of K.
        whole_q = torch.cat((absorbed, self.rope(q_rope, positions)), -1)
        if self.temperature is not None:
            whole_q = whole_q * self.temperature(positions).to(whole_q.dtype)[:, None, None]
        indexer = self.indexer_inputs(layer, h, low, positions, weights, products)
        return AttentionInputs(whole_q, torch.cat((latent, k_rope), -1), latent, indexer)

    def indexer_inputs(
        self,
        layer: int,
        h: torch.Tensor,
        low: torch.Tensor,
        positions: torch.Tensor,
        weights: Weights,
        products: Products,
    ) -> IndexerInputs | None:
        """Of a layer that attends to a choice of keys; h [T, width]: its input, normed; low: q's latent."""
        return None

    def attention_output(
        self, layer: int, o: torch.Tensor, weights: Weights, products: Products
    ) -> torch.Tensor:
        v_b = self._v_b(weights)
        values = torch.cat([products(o[:, i], v_b[i]) for i in range(self.heads)], -1)
        return products(values, weights["attn_output"])

    def _k_b(self, weights: Weights) -> torch.Tensor:
        """[H, latent, nope]."""
        if "attn_k_b" in weights:
            return weights["attn_k_b"].view(self.heads, self.latent, self.nope)
        return self._kv_b(weights)[:, : self.nope].transpose(1, 2)

    def _v_b(self, weights: Weights) -> torch.Tensor:
        """[H, value, latent]."""
        if "attn_v_b" in weights:
            return weights["attn_v_b"].view(self.heads, self.value, self.latent)
        return self._kv_b(weights)[:, self.nope :]

    def _kv_b(self, weights: Weights) -> torch.Tensor:
        """Of each head first the rows of k, then those of v: [H, nope + value, latent]."""
        return weights["attn_kv_b"].view(self.heads, self.nope + self.value, self.latent)

    def _passed_over(self, name: str) -> bool:
        doubled = name.endswith("attn_kv_b.weight") and name.replace("kv_b", "k_b") in self.file.tensors
        return doubled or super()._passed_over(name)
