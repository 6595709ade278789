"""`gemma4`: two kinds of layers, of unlike heads; V from K; keys shared between layers; inputs a layer.

Layers with a window have heads of another size and count than layers that see all keys. Where there is no
`attn_v`, V is K before its norm and rotation; V is always normed, without weights. The last layers have no
keys of their own: they read those of the last layer of their kind that has. The scale is 1. Each layer may
take a vector of the token's own, made from its embedding and from a second table:

    p_l = (rms(W_l x0 / sqrt(width)) + sqrt(size) table_l[token]) / sqrt(2)
    x  <- x + rms(W' (gelu(W'' x) * p_l))

and its result is multiplied by one number. With experts a dense feed-forward runs beside them, each between
norms of its own, and the router sees the residual stream by a norm without weights and a scale a channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from verify.model.architectures.architecture import AttentionInputs, AttentionSettings, TokenRows, Weights
from verify.model.architectures.experts import Experts
from verify.model.architectures.feed_forward import Dense, FeedForward, Key, Pull, Shapes
from verify.model.architectures.grouped_query import GroupedQuery
from verify.model.architectures.mixture import experts_of
from verify.model.blocks import geglu, rms_norm
from verify.model.errors import ModelError
from verify.model.gguf.dequantize import dequantize
from verify.model.gguf.file import GGUFFile
from verify.model.products import Products
from verify.model.rope import Rope

# Where the file does not say.
FINAL_SOFTCAP = 30.0
_FREQUENCIES = "rope_freqs.weight"
_TABLE, _PROJECTION = "per_layer_token_embd.weight", "per_layer_model_proj.weight"
_PROJECTION_NORM = "per_layer_proj_norm.weight"


class Gemma4(GroupedQuery):
    """Gemma 4's text models. own_size: numbers of a layer's vector of a token, 0 where there are none."""

    rope_kind = "neox"
    head_norms = "required"
    post_attention_norm = "post_attention_norm"
    post_ffn_norm = "post_ffw_norm"

    def __init__(self, file: GGUFFile) -> None:
        super().__init__(file)
        read = self.metadata
        self.embedding_scale = self.width**0.5
        self.final_softcap = read.number("final_logit_softcapping", FINAL_SOFTCAP) or None
        self.window = read.whole("attention.sliding_window", least=0) or None
        self.own_size = read.whole("embedding_length_per_layer_input", 0, least=0)
        # Layers from here on have no keys and values of their own.
        self.with_keys = self.layers - read.whole("attention.shared_kv_layers", 0, least=0)
        if not self.with_keys >= 2:
            raise ModelError(
                f"{file.path}: metadata key {read.name('attention.shared_kv_layers')}: expected two layers"
                f" of {self.layers} at least with keys of their own"
            )
        self.local_rope = self.local_rope_of(replace(self.rope, divisors=None), scaled=False)

    def read_head_sizes(self) -> tuple[list[int], list[int]]:
        read = self.metadata
        self.local = read.flags_per_layer("attention.sliding_window_pattern", self.blocks)
        if self.local is None:
            raise ModelError(
                f"{self.file.path}: metadata key {read.name('attention.sliding_window_pattern')}: expected a"
                " flag a layer"
            )
        everywhere = read.whole("attention.key_length"), read.whole("attention.key_length_swa")
        values = read.whole("attention.value_length"), read.whole("attention.value_length_swa")
        if values != everywhere:
            raise ModelError(
                f"{self.file.path}: metadata keys {read.name('attention.value_length')} and _swa:"
                f" expected {everywhere} as of keys, got {values}"
            )
        sizes = [everywhere[windowed] for windowed in self.local]
        return sizes, sizes

    def read_rope(self, head_size: int) -> Rope:
        rope = super().read_rope(self.metadata.whole("attention.key_length"))
        if _FREQUENCIES not in self.file.tensors:
            return rope
        self.expect_shape(_FREQUENCIES, (rope.size // 2,))
        return replace(rope, divisors=dequantize(self.file, _FREQUENCIES))

    @property
    def global_tensors(self) -> Shapes:
        found: Shapes = {_FREQUENCIES: (self.rope.size // 2,)}
        if self.own_size:
            every = self.own_size * self.layers
            found[_TABLE] = (self.vocabulary, every)
            found[_PROJECTION] = (every, self.width)
            found[_PROJECTION_NORM] = (self.own_size,)
        return found

    def check(self) -> None:
        super().check()
        for name, shape in self.global_tensors.items():
            if name != _FREQUENCIES:
                self.expect_shape(name, shape)

    def feed_forward_of(self, layer: int) -> FeedForward:
        dense = Dense(self.width, self.inner(layer), gate=geglu)
        if not self.has(layer, "ffn_gate_inp"):
            return dense
        experts: Experts = experts_of(
            self, layer, gating="softmax", normalised=True, scaled=False, gate=geglu
        )
        return _DenseAndExperts(dense, experts, self.eps)

    def feed_forward_input(self, layer: int, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        if isinstance(self.feed_forwards[layer], _DenseAndExperts):
            return x
        return super().feed_forward_input(layer, x, weights)

    def attention_shapes(self, layer: int) -> tuple[Shapes, Shapes]:
        required, optional = super().attention_shapes(layer)
        may = ["attn_v"] if self.kv_source(layer) == layer else ["attn_k", "attn_v", "attn_k_norm"]
        optional |= {name: required.pop(name) for name in may if name in required}
        return required, optional

    def ends_of_layer(self, layer: int) -> tuple[Shapes, Shapes]:
        required: Shapes = {}
        if self.own_size:
            required["inp_gate"] = (self.own_size, self.width)
            required["proj"] = (self.width, self.own_size)
            required["post_norm"] = (self.width,)
        return required, {"layer_output_scale": (1,)}

    def attention_inputs(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, weights: Weights, products: Products
    ) -> AttentionInputs:
        h = rms_norm(x, weights["attn_norm"], self.eps)
        if "attn_v" in weights or "attn_qkv" in weights:
            q, k, v = self.project(layer, h, weights, products)
        else:
            q, k = (products(h, weights[n], weights.get(f"{n}.bias")) for n in ("attn_q", "attn_k"))
            v = k
        q = q.reshape(len(x), self.heads[layer], -1)
        k, v = (part.reshape(len(x), self.kv_heads[layer], -1) for part in (k, v))
        q, k = (rms_norm(part, weights[f"attn_{n}_norm"], self.eps) for part, n in ((q, "q"), (k, "k")))
        v = rms_norm(v, v.new_ones(()), self.eps)
        rope = self.rope_of_layer(layer)
        return AttentionInputs(rope(q, positions), rope(k, positions), v)

    def attention_queries(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, weights: Weights, products: Products
    ) -> torch.Tensor:
        h = rms_norm(x, weights["attn_norm"], self.eps)
        q = products(h, weights["attn_q"], weights.get("attn_q.bias")).reshape(len(x), self.heads[layer], -1)
        return self.rope_of_layer(layer)(rms_norm(q, weights["attn_q_norm"], self.eps), positions)

    def kv_source(self, layer: int) -> int:
        if layer < self.with_keys:
            return layer
        # As the engine has it: the last two layers with keys are one of each kind.
        return self.with_keys - (2 if self.is_local(layer) else 1)

    def rope_of_layer(self, layer: int) -> Rope:
        return self.local_rope if self.is_local(layer) else self.rope

    def attention_settings(self, layer: int) -> AttentionSettings:
        return AttentionSettings(1.0, self.window if self.is_local(layer) else None)

    def is_local(self, layer: int) -> bool:
        assert self.local is not None
        return self.local[layer]

    def own_inputs(self, embedded: torch.Tensor, rows: TokenRows, products: Products) -> torch.Tensor | None:
        if not self.own_size:
            return None
        projection = rows.weights(_PROJECTION)
        projected = (products(embedded, projection) * self.width**-0.5).unflatten(-1, (self.layers, -1))
        projected = rms_norm(projected, rows.weights(_PROJECTION_NORM), self.eps)
        table = rows.of_tokens(_TABLE).unflatten(-1, (self.layers, -1))
        return (projected + self.own_size**0.5 * table) * 2**-0.5

    def end_of_layer(
        self, layer: int, x: torch.Tensor, own: torch.Tensor | None, weights: Weights, products: Products
    ) -> torch.Tensor:
        if own is not None:
            gate = torch.nn.functional.gelu(products(x, weights["inp_gate"]), approximate="tanh")
            x = x + rms_norm(products(gate * own, weights["proj"]), weights["post_norm"], self.eps)
        return x * weights["layer_output_scale"] if "layer_output_scale" in weights else x


class _DenseAndExperts:
    """A dense feed-forward and experts side by side, on the residual stream, each between its own norms."""

    def __init__(self, dense: Dense, experts: Experts, eps: float) -> None:
        self.dense, self.experts, self.eps = dense, experts, eps

    @property
    def shapes(self) -> Shapes:
        width = (self.dense.width,)
        norms = ("ffn_norm", "pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2", "ffn_gate_inp.scale")
        return self.dense.shapes | self.experts.shapes | dict.fromkeys(norms, width)

    @property
    def streamed(self) -> Shapes:
        return self.experts.streamed

    def __call__(
        self,
        inputs: Iterable[tuple[Key, torch.Tensor]],
        weights: Mapping[str, torch.Tensor],
        products: Products,
        pull: Pull,
    ) -> Iterator[tuple[Key, torch.Tensor]]:
        states = dict(inputs)

        def normed(x: torch.Tensor, name: str) -> torch.Tensor:
            return rms_norm(x, weights[name], self.eps)

        def router(key: Key, _: torch.Tensor) -> torch.Tensor:
            scale = weights["ffn_gate_inp.scale"] * self.dense.width**-0.5
            return products(rms_norm(states[key], scale, self.eps), weights["ffn_gate_inp"])

        experts = replace(self.experts, router=router)
        of_dense = self.dense(
            ((k, normed(x, "ffn_norm")) for k, x in states.items()), weights, products, pull
        )
        dense = {key: normed(out, "post_ffw_norm_1") for key, out in of_dense}
        before = ((key, normed(x, "pre_ffw_norm_2")) for key, x in states.items())
        for key, out in experts(before, weights, products, pull):
            yield key, dense.pop(key) + normed(out, "post_ffw_norm_2")
