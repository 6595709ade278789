"""What an architecture provides: tensors of a layer, and the parts of a layer around attention.

    x --attention_inputs--> q, k, v --attention (the caller's)--> o --after_attention--> x --feed_forward--> x

The feed-forward takes the hidden states of all windows and arms at once, so that an expert is decoded once
for all of them. Both drivers use the same parts: whole windows a layer at a time, and token by token with a
cache.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch

from verify.kernels.heads import Heads
from verify.model.architectures.feed_forward import FeedForward, Key, Shapes
from verify.model.architectures.metadata import WITHOUT_EFFECT, Metadata
from verify.model.blocks import rms_norm
from verify.model.errors import ModelError
from verify.model.gguf.dequantize import dequantize
from verify.model.gguf.file import GGUFFile
from verify.model.gguf.types import TENSOR_TYPES
from verify.model.products import Products
from verify.model.stream import Piece, TensorStream

Weights = Mapping[str, torch.Tensor]
# Columns of a matrix that GPUs do not share out, where its type has no larger blocks.
LEAST_COLUMNS = 16
# Tensors that some converters leave in a layer and that nothing needs: positions' frequencies.
_UNUSED = ("attn_rot_embd.weight", "attn.rotary_emb.inv_freq", "rotary_emb.inv_freq")


class TokenRows(Protocol):
    """Tensors outside the layers, for tokens at hand."""

    def of_tokens(self, name: str) -> torch.Tensor:
        """The tokens' rows of a tensor with a row a token, [T, ...]."""
        ...

    def weights(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        ...


class IndexerInputs(NamedTuple):
    """What an indexer chooses keys by: q [T, H, D], k [T, D], and the weight of each of its heads [T, H]."""

    q: torch.Tensor
    k: torch.Tensor
    weights: torch.Tensor


class AttentionInputs(NamedTuple):
    """q [T, H, Dk], k [T, Hkv, Dk], v [T, Hkv, Dv], float32, before they are rounded to the cache's type.

    indexer: of layers that attend to a choice of keys; keys: that choice, [..., T, K] int32 with -1 for none,
    once it is made (`Architecture.chosen_keys`); None: every key up to a token's own.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    indexer: IndexerInputs | None = None
    keys: torch.Tensor | None = None

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> AttentionInputs:
        """With every tensor [T, ...] of them changed alike, before keys are chosen."""
        indexer = None if self.indexer is None else IndexerInputs(*map(change, self.indexer))
        return AttentionInputs(change(self.q), change(self.k), change(self.v), indexer)


@functools.lru_cache(maxsize=1024)
def _per_head(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Kept, for the host waits for a device that it gives numbers to: a layer has the same in every call."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class AttentionSettings:
    """What attention of a layer takes beside q, k, v.

    sliding_window: keys with 0 <= q - k < window. softcap: of the logits. sinks: a logit a query head, of a
    key whose value is 0. alibi_slopes: one a query head.
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: tuple[float, ...] | None = None
    alibi_slopes: tuple[float, ...] | None = None

    def options(self, device: torch.device) -> dict[str, Any]:
        """As `verify.kernels.call.checked_call` takes them, tensors [H] float32 on the device."""
        per_head = {"sinks": self.sinks, "alibi_slopes": self.alibi_slopes}
        return {
            "scale": self.scale,
            "sliding_window": self.sliding_window,
            "softcap": self.softcap,
            **{
                name: None if values is None else _per_head(values, device)
                for name, values in per_head.items()
            },
        }


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, as its metadata gives them; heads are those of the layer with the most."""

    layers: int
    width: int
    attention: Heads
    vocabulary: int
    context: int

    @property
    def heads(self) -> int:
        return self.attention.q

    @property
    def kv_heads(self) -> int:
        return self.attention.kv

    @property
    def k_size(self) -> int:
        return self.attention.k_size

    @property
    def v_size(self) -> int:
        return self.attention.v_size

    @property
    def ratio(self) -> int:
        return self.attention.ratio


class Architecture(ABC):
    """One model: its sizes, the tensors that each layer needs, and how a layer computes.

    blocks: as many as the file holds; layers: as many as run (those that predict further tokens do not).
    embedding_scale: multiplies the embeddings. final_softcap: of the logits, c tanh(logit / c).
    feed_forwards: one a layer. without_effect: keys of the metadata that change nothing in this architecture.
    output_vector: the output matrix may have a bias.
    """

    sizes: ModelSizes
    embedding_scale: float = 1.0
    final_softcap: float | None = None
    # Numbers of what each layer takes of a token beside its state (`own_inputs`).
    own_size: int = 0
    # Tokens of a sequence that can be computed, where there is a limit.
    longest: int | None = None
    without_effect: frozenset[str] = frozenset()
    output_vector: bool = False
    feed_forwards: list[FeedForward]
    # Names of norms: before the feed-forward, and on the outputs of the two branches where there are any.
    ffn_norm: str = "ffn_norm"
    post_attention_norm: str | None = None
    post_ffn_norm: str | None = None

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.metadata = Metadata(file)
        self.blocks = self.metadata.whole("block_count")
        if self.blocks > len(file.tensors):
            raise ModelError(
                f"{file.path}: metadata key {self.metadata.name('block_count')} is {self.blocks}, expected no"
                f" more than there are tensors, {len(file.tensors)}"
            )
        self.layers = self.blocks - self.metadata.whole("nextn_predict_layers", 0, least=0)
        if self.layers < 1:
            raise ModelError(
                f"{file.path}: metadata key {self.metadata.name('nextn_predict_layers')}:"
                f" expected less than block_count, {self.blocks}"
            )
        self.metadata.running = self.layers
        self.width = self.metadata.whole("embedding_length")
        self.eps = self.metadata.number("attention.layer_norm_rms_epsilon")
        if not 0 <= self.eps < 1:
            raise ModelError(
                f"{file.path}: metadata key {self.metadata.name('attention.layer_norm_rms_epsilon')}:"
                f" expected a number from 0 to 1, got {self.eps:g}"
            )
        embedding = file.tensors.get(self.embedding_tensor)
        if embedding is None:
            raise ModelError(f"{file.path}: tensor {self.embedding_tensor} is missing")
        if len(embedding.shape) != 2:
            raise ModelError(
                f"{file.path}: tensor {self.embedding_tensor} has shape {list(embedding.shape)},"
                " expected a matrix"
            )
        self.vocabulary = embedding.shape[0]

    @abstractmethod
    def attention_shapes(self, layer: int) -> tuple[Shapes, Shapes]:
        """Tensors of the attention branch, its norm left out, that must be there, and ones that may be.

        Short name -> shape. A short name is the tensor's without `blk.N.` and `.weight`.
        """

    @abstractmethod
    def attention_settings(self, layer: int) -> AttentionSettings: ...

    @abstractmethod
    def attention_inputs(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, weights: Weights, products: Products
    ) -> AttentionInputs:
        """x [T, width] of consecutive tokens at `positions` [T]."""

    def chosen_keys(
        self, layer: int, indexer: IndexerInputs | None, kv_len: torch.Tensor
    ) -> torch.Tensor | None:
        """The keys that each token attends to, [B, T, K] int32 with -1 for none; None: all up to its own.

        indexer: q and weights of B sequences' T tokens, k of all S tokens up to the last [B, S, D]; kv_len:
        keys up to each token's own [B, T].
        """
        return None

    def attention_output(
        self, layer: int, o: torch.Tensor, weights: Weights, products: Products
    ) -> torch.Tensor:
        """The attention's output o [T, H, Dv] to the branch's output [T, width]."""
        of_kv_head = o.shape[1] // self.kv_heads_of(layer) * o.shape[2]
        return products.summed(
            o.flatten(1), weights["attn_output"], weights.get("attn_output.bias"), unit=of_kv_head
        )

    def attends(self, layer: int) -> bool:
        """Whether a layer has attention."""
        return True

    def without_attention(
        self,
        layer: int,
        x: torch.Tensor,
        before: Any,
        weights: Weights,
        products: Products,
    ) -> tuple[torch.Tensor, Any]:
        """What stands for attention in a layer that does not attend: x [B, T, width] of B sequences to
        [B * T, width], its branch added, and what the layer keeps of them; before: what it kept of earlier
        tokens, None at their start."""
        raise NotImplementedError(f"layer {layer}")

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values this one reads: mostly itself."""
        return layer

    def attention_queries(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor, weights: Weights, products: Products
    ) -> torch.Tensor:
        """q [T, H, Dk] of a layer that reads another's keys and values."""
        raise NotImplementedError(f"layer {layer}")

    def wanted_later(self, layer: int) -> set[int]:
        """Layers up to this one whose keys and values a later one reads."""
        later = {self.kv_source(after) for after in range(layer + 1, self.layers)}
        return {source for source in later if source <= layer}

    def heads_of(self, layer: int) -> int:
        """Query heads of a layer."""
        return self.sizes.heads

    def kv_heads_of(self, layer: int) -> int:
        """KV heads of a layer."""
        return self.sizes.kv_heads

    def head_sizes_of(self, layer: int) -> tuple[int, int]:
        """Sizes of a head's k and v."""
        return self.sizes.k_size, self.sizes.v_size

    def attention_gate(
        self, layer: int, x: torch.Tensor, weights: Weights, products: Products
    ) -> torch.Tensor | None:
        """What multiplies the attention's output, [T, H, Dv] or [T, H, 1], from x [T, width], if anything."""
        return None

    def after_attention(
        self, layer: int, x: torch.Tensor, o: torch.Tensor, weights: Weights, products: Products
    ) -> torch.Tensor:
        """x [T, width] and the attention's output o [T, H, Dv] to x with the attention branch added."""
        gate = self.attention_gate(layer, x, weights, products)
        if gate is not None:
            o = o * gate
        branch = self.attention_output(layer, o, weights, products)
        if self.post_attention_norm is not None:
            branch = rms_norm(branch, weights[self.post_attention_norm], self.eps)
        return x + branch

    def feed_forward(
        self,
        layer: int,
        states: MutableMapping[Key, torch.Tensor],
        weights: Weights,
        products: Products,
        stream: TensorStream,
        own: Callable[[Key], torch.Tensor] | None = None,
    ) -> None:
        """Replace each hidden state [T, width] by what the next layer takes.

        Keys are the caller's. A state's result does not depend on which others are there. own: a state's rows
        of `own_inputs` for this layer.
        """

        pull = _Experts(self, layer, stream)
        inputs = ((key, self.feed_forward_input(layer, states[key], weights)) for key in list(states))
        for key, branch in self.feed_forwards[layer](inputs, weights, products, pull):
            if self.post_ffn_norm is not None:
                branch = rms_norm(branch, weights[self.post_ffn_norm], self.eps)
            own_rows = None if own is None else own(key)
            states[key] = self.end_of_layer(layer, states[key] + branch, own_rows, weights, products)

    def feed_forward_input(self, layer: int, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        """What the feed-forward takes of x [T, width]."""
        return rms_norm(x, weights[self.ffn_norm], self.eps)

    def own_inputs(self, embedded: torch.Tensor, rows: TokenRows, products: Products) -> torch.Tensor | None:
        """What each layer takes of each token beside the hidden state, [T, layers, P], if anything.

        embedded: the tokens' first states [T, width]; rows: other tensors' rows of the same tokens.
        """
        return None

    def end_of_layer(
        self, layer: int, x: torch.Tensor, own: torch.Tensor | None, weights: Weights, products: Products
    ) -> torch.Tensor:
        """x [T, width] after both branches to what the next layer takes; own: `own_inputs` of it [T, P]."""
        return x

    def ends_of_layer(self, layer: int) -> tuple[Shapes, Shapes]:
        """Tensors of `end_of_layer` that must be there, and ones that may be, as `attention_shapes`."""
        return {}, {}

    def check_length(self, tokens: int) -> None:
        """Raises ModelError for a sequence that is longer than what can be computed."""
        if self.longest is not None and tokens > self.longest:
            raise ModelError(
                f"{self.file.path}: {tokens} tokens: from {self.longest} keys on the model attends to a"
                f" choice of them, which is not computed here; expected at most {self.longest} tokens"
            )

    def per_head(self, layer: int, short: str) -> tuple[float, ...]:
        """A tensor's numbers, one a query head. Raises ModelError."""
        name = self.tensor_name(layer, short)
        self.expect_shape(name, (self.heads_of(layer),))
        return tuple(dequantize(self.file, name).tolist())

    def check_tokens(self, tokens: torch.Tensor) -> None:
        """Raises ModelError where a token has no row in the embedding."""
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocabulary:
            raise ModelError(
                f"{self.file.path}: tensor {self.embedding_tensor} has {self.vocabulary} rows, the text's"
                f" tokens go from {int(tokens.min())} to {int(tokens.max())}"
            )

    def final_norm(self, x: torch.Tensor, weights: Weights) -> torch.Tensor:
        """The last hidden states, ready for the output matrix."""
        return rms_norm(x, weights["output_norm"], self.eps)

    def layer_tensors(self, layer: int) -> dict[str, str]:
        """Short name -> tensor name, for every tensor of a layer that is held while it runs."""
        required, optional = self._held(layer)
        there = {short: self.tensor_name(layer, short) for short in (*required, *optional)}
        return {short: name for short, name in there.items() if name in self.file.tensors}

    def feed_forward_tensors(self, layer: int) -> dict[str, str]:
        """Those of `layer_tensors` that `feed_forward` takes: they need not be held while attention runs."""
        ends = self.ends_of_layer(layer)
        taken = {self.ffn_norm, self.post_ffn_norm, *self.feed_forwards[layer].shapes, *ends[0], *ends[1]}
        return {short: name for short, name in self.layer_tensors(layer).items() if short in taken}

    def has(self, layer: int, short: str) -> bool:
        return self.tensor_name(layer, short) in self.file.tensors

    @staticmethod
    def tensor_name(layer: int, short: str) -> str:
        return f"blk.{layer}.{short}" + ("" if short.endswith((".bias", ".scale")) else ".weight")

    @property
    def embedding_tensor(self) -> str:
        return "token_embd.weight"

    @property
    def output_tensor(self) -> str:
        """The output matrix; files with tied embeddings leave it out."""
        return "output.weight" if "output.weight" in self.file.tensors else self.embedding_tensor

    @property
    def end_tensors(self) -> dict[str, str]:
        """Short name -> tensor name, of what is held while logits are computed."""
        named = {"output_norm": "output_norm.weight", "output.bias": "output.bias"}
        return {short: name for short, name in named.items() if name in self.file.tensors}

    def finish_logits(self, logits: torch.Tensor, vocabulary: range, weights: Weights) -> torch.Tensor:
        """What the output matrix gave for part of the vocabulary, [T, V], to logits, in place."""
        if "output.bias" in weights:
            logits += weights["output.bias"][vocabulary.start : vocabulary.stop]
        if self.final_softcap is not None:
            logits.div_(self.final_softcap).tanh_().mul_(self.final_softcap)
        return logits

    @property
    def global_tensors(self) -> Shapes:
        """Tensors outside the layers that may be there, beside the embeddings, the output and its norm."""
        return {}

    def check(self) -> None:
        """Every tensor that is needed is there in its shape, and there is none that would be passed over.

        Raises ModelError naming the tensor.
        """
        outside = {
            "output_norm.weight": (self.width,),
            self.embedding_tensor: (self.vocabulary, self.width),
            self.output_tensor: (self.vocabulary, self.width),
        }
        known = set(outside)
        for name, shape in outside.items():
            self.expect_shape(name, shape)
        optional = self.global_tensors | ({"output.bias": (self.vocabulary,)} if self.output_vector else {})
        for name, shape in optional.items():
            if name in self.file.tensors:
                self.expect_shape(name, shape)
            known.add(name)
        for layer in range(self.layers):
            required, optional = self._held(layer)
            for short, shape in (required | self.feed_forwards[layer].streamed).items():
                self.expect_shape(self.tensor_name(layer, short), shape)
                known.add(self.tensor_name(layer, short))
            for short, shape in optional.items():
                name = self.tensor_name(layer, short)
                known.add(name)
                if name in self.file.tensors:
                    self.expect_shape(name, shape)
        for name in list(self.file.tensors):
            if name not in known and not self._passed_over(name) and not self._scales(name, known):
                raise ModelError(
                    f"{self.file.path}: tensor {name} is not known in {self.file.architecture!r} files,"
                    " and to pass over it could change what the model computes"
                )
        self.metadata.check_all_asked(WITHOUT_EFFECT | self.without_effect)

    def expect_shape(self, tensor: str, shape: tuple[int, ...]) -> None:
        """Raises ModelError if the tensor is missing or has another shape; [1, n] may stand for [n]."""
        info = self.file.tensors.get(tensor)
        if info is None:
            raise ModelError(f"{self.file.path}: tensor {tensor} is missing")
        if without_ones(info.shape) == without_ones(shape):
            self.file.tensors[tensor] = replace(info, shape=shape)
        else:
            raise ModelError(
                f"{self.file.path}: tensor {tensor} has shape {list(info.shape)}, expected {list(shape)}"
            )

    def _held(self, layer: int) -> tuple[Shapes, Shapes]:
        """Tensors that are held while a layer runs: those it must have, those it may have."""
        required, optional = self.attention_shapes(layer)
        norms = ("attn_norm", self.ffn_norm, self.post_attention_norm, self.post_ffn_norm)
        named: Shapes = {norm: (self.width,) for norm in norms if norm is not None}
        block = self.feed_forwards[layer]
        ends = self.ends_of_layer(layer)
        return named | required | block.shapes | ends[0], optional | ends[1]

    def _passed_over(self, name: str) -> bool:
        """Whether a tensor is rightly not used: of a layer that does not run, or of no effect."""
        part, _, rest = name.removeprefix("blk.").partition(".")
        if name.startswith("blk.") and part.isdigit() and self.layers <= int(part) < self.blocks:
            return True
        return rest in _UNUSED or name.startswith("rope_factors_")

    def _scales(self, name: str, known: set[str]) -> bool:
        """Whether a tensor is a matrix's scale, which `TensorStream` multiplies it by. Raises ModelError.

        Scales of the inputs, for kernels that quantise them, are passed over.
        """
        stem, _, kind = name.rpartition(".")
        matrix = f"{stem}.weight"
        if kind not in ("scale", "input_scale") or matrix not in known or matrix not in self.file.tensors:
            return False
        shape = self.file.tensors[matrix].shape
        if len(shape) < 2 or matrix == self.embedding_tensor:
            return False
        if kind == "scale":
            self.expect_shape(name, shape[:1] if len(shape) == 3 else (1,))
        return True


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the dimensions of 1 in front."""
    first = next((i for i, n in enumerate(shape) if n != 1), len(shape))
    return tuple(shape[first:])


class _Experts:
    """The `Pull` of a layer: parts of its tensors from a stream."""

    def __init__(self, architecture: Architecture, layer: int, stream: TensorStream) -> None:
        self.architecture, self.layer, self.stream = architecture, layer, stream

    def announce(self, names: Iterable[str], experts: Iterable[int]) -> Sequence[int]:
        wanted = self.stream.agreed(experts)
        full = [self.architecture.tensor_name(self.layer, name) for name in names]
        self.stream.ahead(Piece(name, (expert, expert + 1)) for expert in wanted for name in full)
        return wanted

    def unit(self, name: str) -> int:
        """16 columns, or a block of the tensor's type where that is more: as ik_llama.cpp cuts them."""
        tensor = self.architecture.file.tensors[self.architecture.tensor_name(self.layer, name)]
        return max(TENSOR_TYPES[tensor.type_id].block_size, LEAST_COLUMNS)

    def __call__(self, name: str, expert: int) -> torch.Tensor:
        full = self.architecture.tensor_name(self.layer, name)
        return self.stream.take(full, slice(expert, expert + 1))[0]
