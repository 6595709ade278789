"""Grouped-query attention with rotary embeddings, in the variants that architectures declare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from verify.kernels.heads import Heads
from verify.model.architectures.architecture import (
    Architecture,
    AttentionInputs,
    AttentionSettings,
    ModelSizes,
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

    rope_kind: as the file's q and k rows are stored. head_norms: RMSNorm of each q and k head before
    rotation; row_norms: of all heads of a token together. output_bias: the output matrix of attention may
    have one; q, k and v may in every architecture, and may be one tensor `attn_qkv`.
    heads, kv_heads, k_sizes, v_sizes: by block.
    """

    rope_kind: RopeKind = "neox"
    head_norms: Presence = "never"
    row_norms: bool = False
    output_bias: bool = False

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        self.heads, self.kv_heads = self.read_heads()
        for layer, (heads, kv_heads) in enumerate(zip(self.heads, self.kv_heads, strict=True)):
            if self.attends(layer) and (not kv_heads or heads % kv_heads):
                raise ModelError(
                    f"{file.path}: layer {layer}: {heads} query heads are not a multiple of"
                    f" {kv_heads} KV heads"
                )
        self.k_sizes, self.v_sizes = self.read_head_sizes()
        widest = max(filter(self.attends, range(self.layers)), key=lambda layer: self.heads[layer])
        self.sizes = ModelSizes(
            layers=self.layers,
            width=self.width,
            attention=Heads(
                self.heads[widest], self.kv_heads[widest], self.k_sizes[widest], self.v_sizes[widest]
            ),
            vocabulary=self.vocabulary,
            context=self.metadata.whole("context_length"),
        )
        self.rope = self.read_rope(self.sizes.k_size)
        self.feed_forwards = [self.feed_forward_of(layer) for layer in range(self.layers)]

    def read_heads(self) -> tuple[list[int], list[int]]:
        """Query heads and KV heads of each block."""
        read = self.metadata
        heads = read.per_layer("attention.head_count", self.blocks)
        if read.get("attention.head_count_kv") is None:
            return heads, heads
        return heads, read.per_layer("attention.head_count_kv", self.blocks)

    def read_head_sizes(self) -> tuple[list[int], list[int]]:
        """Sizes of a head's k and v, of each block."""
        read, heads = self.metadata, self.heads[0]
        if read.get("attention.key_length") is None and self.width % heads:
            raise ModelError(
                f"{self.file.path}: embedding_length {self.width} is not a multiple of {heads} heads,"
                f" and {read.name('attention.key_length')} is missing"
            )
        k_size = read.whole("attention.key_length", self.width // heads)
        return [k_size] * self.blocks, [read.whole("attention.value_length", k_size)] * self.blocks

    def feed_forward_of(self, layer: int) -> FeedForward:
        """The feed-forward of a layer, from the metadata."""
        return Dense(self.width, self.inner(layer))

    def inner(self, layer: int) -> int:
        """Inner dimension of a dense feed-forward."""
        return self.metadata.per_layer("feed_forward_length", self.blocks)[layer]

    def read_rope(self, head_size: int) -> Rope:
        """The rotation that the metadata describes. Raises ModelError on one that is not known."""
        return rope_of(self, head_size, self.rope_kind, default_size=head_size)

    def local_rope_of(self, rope: Rope, *, scaled: bool) -> Rope:
        """The rotation of layers with a window: as the others' where the file does not say otherwise.

        scaled: whether their positions are scaled too. If not, `attn_factor` is still theirs.
        """
        read = self.metadata
        if not scaled:
            magnitude = read.number("rope.scaling.attn_factor", 1.0)
            rope = replace(rope, factor=1.0, original_context=None, magnitude=magnitude)
        return replace(
            rope,
            base=read.number("rope.freq_base_swa", rope.base),
            size=read.whole("rope.dimension_count_swa", rope.size),
        )

    def rope_of_layer(self, layer: int) -> Rope:
        return self.rope

    def attention_settings(self, layer: int) -> AttentionSettings:
        return AttentionSettings(scale=self.k_sizes[layer] ** -0.5)

    def heads_of(self, layer: int) -> int:
        return self.heads[layer]

    def kv_heads_of(self, layer: int) -> int:
        return self.kv_heads[layer]

    def head_sizes_of(self, layer: int) -> tuple[int, int]:
        return self.k_sizes[layer], self.v_sizes[layer]

    def attention_shapes(self, layer: int) -> tuple[Shapes, Shapes]:
        k_size, v_size = self.head_sizes_of(layer)
        rows = self.projections(layer)
        required: Shapes = {"attn_output": (self.width, self.heads[layer] * v_size)}
        optional: Shapes = {}
        if self.has(layer, "attn_qkv"):
            rows = {"attn_qkv": sum(rows.values())}
        for name, n in rows.items():
            required[name] = (n, self.width)
            optional[f"{name}.bias"] = (n,)
        if self.output_bias:
            optional["attn_output.bias"] = (self.width,)
        if self.row_norms:
            required["attn_q_norm"] = (self.heads[layer] * k_size,)
            required["attn_k_norm"] = (self.kv_heads[layer] * k_size,)
        norms: Shapes = {"attn_q_norm": (k_size,), "attn_k_norm": (k_size,)}
        if self.head_norms == "required" or (
            self.head_norms == "optional" and any(self.has(layer, norm) for norm in norms)
        ):
            required |= norms
        return required, optional

    def attention_inputs(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, weights: Weights, products: Products
    ) -> AttentionInputs:
        h = rms_norm(x, weights["attn_norm"], self.eps)
        q, k, v = self.project(layer, h, weights, products)
        if self.row_norms:
            q = rms_norm(q, weights["attn_q_norm"], self.eps)
            k = rms_norm(k, weights["attn_k_norm"], self.eps)
        q = q.reshape(len(x), self.heads[layer], -1)
        k, v = (part.reshape(len(x), self.kv_heads[layer], -1) for part in (k, v))
        if "attn_q_norm" in weights and not self.row_norms:
            q = rms_norm(q, weights["attn_q_norm"], self.eps)
            k = rms_norm(k, weights["attn_k_norm"], self.eps)
        rope = self.rope_of_layer(layer)
        return AttentionInputs(rope(q, positions), rope(k, positions), v)

    def projections(self, layer: int) -> dict[str, int]:
        """Tensors of q, k and v, and their rows."""
        heads, kv_heads = self.heads[layer], self.kv_heads[layer]
        k_size, v_size = self.head_sizes_of(layer)
        sizes = (heads * k_size, kv_heads * k_size, kv_heads * v_size)
        return dict(zip(("attn_q", "attn_k", "attn_v"), sizes, strict=True))

    def project(
        self, layer: int, h: torch.Tensor, weights: Weights, products: Products
    ) -> Sequence[torch.Tensor]:
        """h [T, width] to q, k and v, each [T, its rows]."""
        rows = self.projections(layer)
        if "attn_qkv" in weights:
            together = products(h, weights["attn_qkv"], weights.get("attn_qkv.bias"))
            return together.split(list(rows.values()), -1)
        return [products(h, weights[name], weights.get(f"{name}.bias")) for name in rows]


def rope_of(
    architecture: Architecture,
    head_size: int,
    kind: RopeKind,
    *,
    default_size: int,
    log_multiplier: float | None = None,
) -> Rope:
    """The rotation that `rope.*` of the metadata describes, as llama.cpp reads it.

    Scaling is linear where the file does not say which; `rope.scale_linear` is the factor's older name;
    `attn_factor` multiplies what is rotated with every kind of scaling. log_multiplier: what YaRN's magnitude
    is divided by, m = 1 + log_multiplier ln(factor), in architectures that have one.
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
    if base <= 0:
        raise ModelError(
            f"{path}: metadata key {read.name('rope.freq_base')}: expected a number above 0, got {base:g}"
        )
    scaling = read.word("rope.scaling.type", "linear")
    if scaling not in ("none", "linear", "yarn"):
        raise ModelError(
            f"{path}: metadata key {read.name('rope.scaling.type')} is {scaling!r},"
            " expected none, linear or yarn"
        )
    factor = _scaling_factor(architecture)
    magnitude = read.number("rope.scaling.attn_factor", 1.0)
    if scaling == "none":
        return Rope(kind, size, base, magnitude=magnitude)
    if scaling == "linear":
        return Rope(kind, size, base, factor, magnitude=magnitude)
    if base <= 1:
        raise ModelError(
            f"{path}: metadata key {read.name('rope.freq_base')}: expected a number above 1 with yarn,"
            f" got {base:g}"
        )
    original = read.whole("rope.scaling.original_context_length", read.whole("context_length"))
    if factor > 1:
        magnitude *= 1 + 0.1 * math.log(factor)
        if log_multiplier:
            magnitude /= 1 + log_multiplier * math.log(factor)
    return Rope(
        kind=kind, size=size, base=base, factor=factor, original_context=original, magnitude=magnitude
    )


def _scaling_factor(architecture: Architecture) -> float:
    """What positions are divided by; zero stands for one. Raises ModelError."""
    read = architecture.metadata
    key = "rope.scaling.factor" if read.get("rope.scaling.factor") is not None else "rope.scale_linear"
    factor = read.number(key, 1.0) or 1.0
    if factor < 0:
        raise ModelError(
            f"{architecture.file.path}: metadata key {read.name(key)}: expected a number above 0,"
            f" got {factor:g}"
        )
    return factor


def check_sections(architecture: Architecture, pairs: int, *, interleaved: bool = False) -> bool:
    """Whether `rope.dimension_sections` asks for several positions a token; on a text they are all one.

    The fourth of them is 0 on a text, and nobody needs that: a pair that it turns is refused. interleaved:
    the first three take turns. Raises ModelError.
    """
    read = architecture.metadata
    sections = read.get("rope.dimension_sections")
    if sections is None:
        return False
    name = f"{architecture.file.path}: metadata key {read.name('rope.dimension_sections')}"
    if not isinstance(sections, np.ndarray) or not 2 <= len(sections) <= 4:
        raise ModelError(f"{name}: expected 2 to 4 numbers, got {sections!r:.60}")
    numbers = [*sections.tolist(), 0, 0][:4]
    if not (numbers[0] > 0 < numbers[1]):
        return False
    whole = sum(numbers)
    for pair in range(pairs):
        at = pair % whole
        first_three = at < 3 * numbers[at % 3] if interleaved else at < sum(numbers[:3])
        if not first_three:
            raise ModelError(
                f"{name} is {numbers}: expected the first three to turn all {pairs} pairs, not pair {pair}"
            )
    return True
