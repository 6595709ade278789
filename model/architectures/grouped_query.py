"""Grouped-query attention with rotary embeddings, in the variants that architectures declare."""

from __future__ import annotations

import math
from typing import Literal

import torch

from verify.model.architectures.architecture import (
    Architecture,
    AttentionInputs,
    AttentionSettings,
    Sizes,
    Weights,
)
from verify.model.architectures.feed_forward import Dense, FeedForward, Shapes
from verify.model.blocks import rms_norm
from verify.model.errors import ModelError
from verify.model.gguf.file import GGUFFile
from verify.model.products import Products
from verify.model.rope import Rope, RopeKind

Presence = Literal["never", "optional", "required"]


class GroupedQuery(Architecture):
    """Query heads that share KV heads: head h reads KV head h // (heads / kv_heads).

    rope_kind: as the file's q and k rows are stored. rotated: the share of a head that is rotated where the
    metadata does not say. biases: of q, k and v. head_norms: RMSNorm of each q and k head before rotation.
    fused_qkv: q, k and v may be one tensor `attn_qkv`.
    """

    rope_kind: RopeKind = "neox"
    rotated: float = 1.0
    biases: Presence = "never"
    head_norms: Presence = "never"
    fused_qkv: bool = False

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        read = self.metadata
        self.heads = read.per_layer("attention.head_count", self.blocks)
        self.kv_heads = self.heads
        if read.get("attention.head_count_kv") is not None:
            self.kv_heads = read.per_layer("attention.head_count_kv", self.blocks)
        for layer, (heads, kv_heads) in enumerate(zip(self.heads, self.kv_heads, strict=True)):
            if heads % kv_heads:
                raise ModelError(
                    f"{file.path}: layer {layer}: {heads} query heads are not a multiple of"
                    f" {kv_heads} KV heads"
                )
        if read.get("attention.key_length") is None and self.width % self.heads[0]:
            raise ModelError(
                f"{file.path}: embedding_length {self.width} is not a multiple of {self.heads[0]} heads,"
                f" and {read.name('attention.key_length')} is missing"
            )
        k_size = read.whole("attention.key_length", self.width // self.heads[0])
        widest = max(range(self.layers), key=lambda layer: self.heads[layer])
        self.sizes = Sizes(
            layers=self.layers,
            width=self.width,
            heads=self.heads[widest],
            kv_heads=self.kv_heads[widest],
            k_size=k_size,
            v_size=read.whole("attention.value_length", k_size),
            vocabulary=self.vocabulary,
            context=read.whole("context_length"),
        )
        self.rope = self.read_rope(k_size)
        self.feed_forwards = [self.feed_forward_of(layer) for layer in range(self.layers)]

    def feed_forward_of(self, layer: int) -> FeedForward:
        """The feed-forward of a layer, from the metadata."""
        return Dense(self.width, self.inner(layer))

    def inner(self, layer: int) -> int:
        """Inner dimension of a dense feed-forward."""
        return self.metadata.per_layer("feed_forward_length", self.blocks)[layer]

    def read_rope(self, head_size: int) -> Rope:
        """The rotation that the metadata describes. Raises ModelError on one that is not known."""
        return rope_of(self, head_size, self.rope_kind, default_size=int(head_size * self.rotated))

    def rope_of_layer(self, layer: int) -> Rope:
        return self.rope

    def attention_settings(self, layer: int) -> AttentionSettings:
        return AttentionSettings(scale=self.sizes.k_size**-0.5)

    def kv_heads_of(self, layer: int) -> int:
        return self.kv_heads[layer]

    def attention_shapes(self, layer: int) -> tuple[Shapes, Shapes]:
        s = self.sizes
        rows = self._rows(layer)
        required: Shapes = {"attn_output": (self.width, self.heads[layer] * s.v_size)}
        optional: Shapes = {}
        if self.fused_qkv and self.has(layer, "attn_qkv"):
            rows = {"attn_qkv": sum(rows.values())}
        for name, n in rows.items():
            required[name] = (n, self.width)
            self._declare(self.biases, {f"{name}.bias": (n,)}, required, optional)
        if self.biases == "optional":
            optional["attn_output.bias"] = (self.width,)
        norms: Shapes = {"attn_q_norm": (s.k_size,), "attn_k_norm": (s.k_size,)}
        self._declare(self.head_norms, norms, required, optional)
        if self.head_norms == "optional" and self.has(layer, "attn_q_norm") != self.has(layer, "attn_k_norm"):
            required |= norms
        return required, optional

    def attention_inputs(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, weights: Weights, products: Products
    ) -> AttentionInputs:
        h = rms_norm(x, weights["attn_norm"], self.eps)
        rows = self._rows(layer)
        if "attn_qkv" in weights:
            together = products(h, weights["attn_qkv"], weights.get("attn_qkv.bias"))
            parts = together.split(list(rows.values()), -1)
        else:
            parts = tuple(products(h, weights[name], weights.get(f"{name}.bias")) for name in rows)
        q = parts[0].reshape(len(x), self.heads[layer], -1)
        k, v = (part.reshape(len(x), self.kv_heads[layer], -1) for part in parts[1:])
        if "attn_q_norm" in weights:
            q = rms_norm(q, weights["attn_q_norm"], self.eps)
            k = rms_norm(k, weights["attn_k_norm"], self.eps)
        rope = self.rope_of_layer(layer)
        return AttentionInputs(rope(q, positions), rope(k, positions), v)

    def _rows(self, layer: int) -> dict[str, int]:
        """Rows of q, k and v."""
        heads, kv_heads = self.heads[layer], self.kv_heads[layer]
        sizes = (heads * self.sizes.k_size, kv_heads * self.sizes.k_size, kv_heads * self.sizes.v_size)
        return dict(zip(("attn_q", "attn_k", "attn_v"), sizes, strict=True))

    @staticmethod
    def _declare(presence: Presence, shapes: Shapes, required: Shapes, optional: Shapes) -> None:
        if presence == "required":
            required |= shapes
        elif presence == "optional":
            optional |= shapes


def rope_of(architecture: Architecture, head_size: int, kind: RopeKind, *, default_size: int) -> Rope:
    """The rotation that `rope.*` of the metadata describes: none, linear or YaRN scaling.

    Raises ModelError on another scaling, or on sizes that cannot be.
    """
    read, path = architecture.metadata, architecture.file.path
    size = read.whole("rope.dimension_count", default_size)
    if size % 2 or size > head_size:
        raise ModelError(
            f"{path}: metadata key {read.name('rope.dimension_count')}: expected an even number up to the"
            f" head size of {head_size}, got {size}"
        )
    base = read.number("rope.freq_base", 10000.0)
    scaling = read.word("rope.scaling.type", "none")
    if scaling == "none":
        return Rope(kind, size, base)
    factor = read.number("rope.scaling.factor")
    if factor <= 0:
        raise ModelError(
            f"{path}: metadata key {read.name('rope.scaling.factor')}: expected a number above 0,"
            f" got {factor:g}"
        )
    if scaling == "linear":
        return Rope(kind, size, base, factor)
    if scaling == "yarn":
        original = read.whole("rope.scaling.original_context_length")
        magnitude = (1 + 0.1 * math.log(factor)) * read.number("rope.scaling.attn_factor", 1.0)
        return Rope(kind, size, base, factor, original, magnitude)
    raise ModelError(
        f"{path}: metadata key {read.name('rope.scaling.type')} is {scaling!r}, expected none, linear or yarn"
    )
