"""`llama`: grouped-query attention, NORM rotary embeddings, SwiGLU; SmolLM2, Llama 2 and 3, Mistral."""

from __future__ import annotations

import torch

from model.architectures.architecture import (
    Architecture,
    AttentionInputs,
    AttentionSettings,
    Sizes,
    Weights,
)
from model.blocks import RopeKind, apply_rope, rms_norm, rope_angles, swiglu
from model.dequantize import dequantize
from model.errors import ModelError
from model.gguf_file import GGUFFile
from model.products import Products

LAYER_TENSORS = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)


class Llama(Architecture):
    """The dense llama architecture; its q and k rows are stored permuted for NORM rotation."""

    rope_kind: RopeKind = "norm"

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        if file.metadata.get(f"{file.architecture}.expert_count"):
            raise ModelError(f"{file.path}: mixture of experts is not read for {file.architecture!r}")
        width, heads = self.whole("embedding_length"), self.whole("attention.head_count")
        k_size = self.whole("attention.key_length", width // heads)
        embedding = file.tensors.get(self.embedding_tensor)
        if embedding is None:
            raise ModelError(f"{file.path}: tensor {self.embedding_tensor} is missing")
        self.sizes = Sizes(
            layers=self.whole("block_count"),
            width=width,
            heads=heads,
            kv_heads=self.whole("attention.head_count_kv", heads),
            k_size=k_size,
            v_size=self.whole("attention.value_length", k_size),
            vocabulary=embedding.shape[0],
            context=self.whole("context_length"),
        )
        if heads % self.sizes.kv_heads:
            raise ModelError(
                f"{file.path}: {heads} query heads are not a multiple of {self.sizes.kv_heads} KV heads"
            )
        self.feed_forward = self.whole("feed_forward_length")
        self.eps = self.number("attention.layer_norm_rms_epsilon")
        self.rope_base = self.number("rope.freq_base", 10000.0)
        self.rope_size = self.whole("rope.dimension_count", k_size)
        scaling = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
        if scaling not in ("none", ""):
            raise ModelError(
                f"{file.path}: rope.scaling.type {scaling!r} is not read for {file.architecture!r}"
            )
        self._check_shapes()
        self.rope_factors: torch.Tensor | None = None
        if "rope_freqs.weight" in file.tensors:
            self.expect_shape("rope_freqs.weight", (self.rope_size // 2,))
            self.rope_factors = dequantize(file, "rope_freqs.weight")

    def layer_tensors(self, layer: int) -> dict[str, str]:
        found = {name: f"blk.{layer}.{name}.weight" for name in LAYER_TENSORS}
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            if f"blk.{layer}.{name}.bias" in self.file.tensors:
                found[f"{name}.bias"] = f"blk.{layer}.{name}.bias"
        return found

    def attention_settings(self, layer: int) -> AttentionSettings:
        return AttentionSettings(scale=self.sizes.k_size**-0.5)

    def attention_inputs(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, weights: Weights, products: Products
    ) -> AttentionInputs:
        rows, sizes = x.shape[0], self.sizes
        h = rms_norm(x, weights["attn_norm"], self.eps)
        q, k, v = (
            products(h, weights[name], weights.get(f"{name}.bias")).view(rows, heads, -1)
            for name, heads in (
                ("attn_q", sizes.heads),
                ("attn_k", sizes.kv_heads),
                ("attn_v", sizes.kv_heads),
            )
        )
        factors = None if self.rope_factors is None else self.rope_factors.to(x.device)
        angles = rope_angles(positions, self.rope_size, self.rope_base, factors)
        return AttentionInputs(
            apply_rope(q, angles, self.rope_kind), apply_rope(k, angles, self.rope_kind), v
        )

    def after_attention(
        self, layer: int, x: torch.Tensor, o: torch.Tensor, weights: Weights, products: Products
    ) -> torch.Tensor:
        x = x + products(o.flatten(1), weights["attn_output"], weights.get("attn_output.bias"))
        h = rms_norm(x, weights["ffn_norm"], self.eps)
        gated = swiglu(products(h, weights["ffn_gate"]), products(h, weights["ffn_up"]))
        return x + products(gated, weights["ffn_down"])

    def final_norm(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        return rms_norm(x, weights["output_norm"], self.eps)

    def _check_shapes(self) -> None:
        s, width, inner = self.sizes, self.sizes.width, self.feed_forward
        expected = {
            "attn_norm": (width,),
            "attn_q": (s.heads * s.k_size, width),
            "attn_k": (s.kv_heads * s.k_size, width),
            "attn_v": (s.kv_heads * s.v_size, width),
            "attn_output": (width, s.heads * s.v_size),
            "ffn_norm": (width,),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        }
        for layer in range(s.layers):
            for name, shape in expected.items():
                self.expect_shape(f"blk.{layer}.{name}.weight", shape)
        self.expect_shape("output_norm.weight", (width,))
        self.expect_shape(self.embedding_tensor, (s.vocabulary, width))
        self.expect_shape(self.output_tensor, (s.vocabulary, width))
