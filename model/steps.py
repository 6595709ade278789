"""The other driver: token by token with a cache, as text is generated, every arm at once.

    x of the new tokens --layer--> k, v appended to the arm's cache; attention of the new tokens over it

Layers are those of `verify.model.group`, and so is the one rounding of q, k and v. All arms are given the
same tokens; each has a cache of its own, one sequence long, of keys and values in the run's attention type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from verify.kernels.cache_types import run_cache
from verify.kernels.lengths import keep_lengths
from verify.kernels.numbers import FLOAT_TYPES
from verify.model.architectures.architecture import Architecture, IndexerInputs
from verify.model.errors import ModelError
from verify.model.layer_call import AttentionPass, LayerCall, round_inputs
from verify.model.products import Products, tile_rows
from verify.model.stopwatch import Stopwatch
from verify.model.stream import TensorStream

_FIRST_ROOM = 64


class Stepper:
    """One sequence of one model, through some arms.

    Weights are dequantized again for every step unless `keep_weights`, which takes `weight_bytes` of memory.
    Experts are always decoded when they are chosen. gpus: as in `Runner`.
    """

    def __init__(
        self,
        architecture: Architecture,
        arms: Sequence[AttentionPass],
        *,
        device: torch.device,
        attention_type: str = "f16",
        keep_weights: bool = True,
        gpus: int = 1,
    ) -> None:
        self.architecture, self.arms, self.device = architecture, list(arms), device
        self.attention_type = attention_type
        self.keep_weights = keep_weights
        self.stopwatch: Stopwatch[str] = Stopwatch(device)
        self.products = Products(0, self.stopwatch, gpus)
        self.stream = TensorStream(architecture.file, device, self.stopwatch)
        self.length = 0
        self._caches: dict[tuple[str, int], _Cache] = {}
        # What layers without attention keep; never written to, but replaced.
        self._recurrent: dict[tuple[str, int], Any] = {}
        self._kept: dict[str, dict[str, torch.Tensor]] = {}

    def beside(self, arms: Sequence[AttentionPass]) -> Stepper:
        """Other arms at the start of a sequence, with the weights that this one has decoded."""
        other = Stepper(
            self.architecture,
            arms,
            device=self.device,
            attention_type=self.attention_type,
            keep_weights=self.keep_weights,
            gpus=self.products.gpus,
        )
        other._kept, other.stream = self._kept, self.stream
        return other

    def close(self) -> None:
        """End the reading of the file, for those made by `beside` and `branch` too."""
        self.stream.close()

    def branch(self, arm: AttentionPass, after: str) -> Stepper:
        """One arm that goes on, on tokens of its own, from where the arm named `after` is now."""
        other = self.beside([arm])
        other.length = self.length
        for (name, layer), cache in self._caches.items():
            if name == after:
                other._caches[arm.name, layer] = cache.copy()
        for (name, layer), state in self._recurrent.items():
            if name == after:
                other._recurrent[arm.name, layer] = state
        return other

    def cut(self, length: int) -> None:
        """Forget all tokens but the first so many, as where a draft is not taken.

        Raises ModelError where there are not so many, and of a model with recurrent layers, whose state
        holds every token that it has seen.
        """
        if self._recurrent:
            raise ModelError("recurrent layers: their state cannot be cut back to an earlier token")
        if not 0 <= length <= self.length:
            raise ModelError(f"length {length}: expected 0 to {self.length} tokens, as there are")
        self.length = length
        for cache in self._caches.values():
            cache.length = length

    def step(self, tokens: torch.Tensor, *, scored: int | None = None) -> dict[str, torch.Tensor]:
        """Append tokens [T] to the sequence; logits by arm, [scored, vocabulary] float32, of its last tokens.

        scored: how many, all by default. An arm whose `attend` returns None takes no further part. Raises
        ModelError where there are no tokens, or one is not of the vocabulary.
        """
        architecture, n = self.architecture, len(tokens)
        if n == 0:
            raise ModelError("tokens: expected at least one")
        architecture.check_tokens(tokens)
        products = self.products.with_tile(tile_rows(n))
        positions = torch.arange(self.length, self.length + n, device=self.device)
        kv_len = keep_lengths((positions + 1).to(torch.int32)[None])
        architecture.check_length(self.length + n)
        rows = _StepRows(self, tokens)
        start = rows.of_tokens(architecture.embedding_tensor) * architecture.embedding_scale
        own = architecture.own_inputs(start, rows, products)
        states = {arm.name: start for arm in self.arms}
        kind = run_cache(self.attention_type)

        def own_of(layer: int) -> Callable[[str], torch.Tensor] | None:
            return None if own is None else lambda name: own[:, layer]

        for layer in range(architecture.sizes.layers):
            weights = self._weights(f"layer {layer}", architecture.layer_tensors(layer))
            if not architecture.attends(layer):
                for arm in self.arms:
                    key = arm.name, layer
                    states[arm.name], self._recurrent[key] = architecture.without_attention(
                        layer, states[arm.name][None], self._recurrent.get(key), weights, products
                    )
                architecture.feed_forward(layer, states, weights, products, self.stream, own_of(layer))
                continue
            settings, source = architecture.attention_settings(layer), architecture.kv_source(layer)
            for arm in list(self.arms):
                x = states[arm.name]
                keys = None
                if source == layer:
                    inputs = architecture.attention_inputs(layer, x, positions, weights, products)
                    rounded = round_inputs(inputs, kind, layer)
                    q, cache = rounded.q, self._caches.setdefault((arm.name, layer), _Cache())
                    k, v = cache.append(rounded.k, rounded.v)
                    if inputs.indexer is not None:
                        keys = architecture.chosen_keys(layer, cache.index(inputs.indexer), kv_len)
                else:
                    q = architecture.attention_queries(layer, x, positions, weights, products)
                    q = q.to(FLOAT_TYPES[kind.attention].dtype)
                    k, v = self._caches[arm.name, source].held()
                with self.stopwatch.time("attention"):
                    o = arm.attend(
                        LayerCall(
                            layer=layer,
                            window=0,
                            q=q[None],
                            k=k[None],
                            v=v[None],
                            kv_len=kv_len,
                            settings=settings,
                            keys=keys,
                        )
                    )
                if o is None:
                    self.arms.remove(arm)
                    del states[arm.name]
                    continue
                states[arm.name] = architecture.after_attention(layer, x, o[0], weights, products)
            architecture.feed_forward(layer, states, weights, products, self.stream, own_of(layer))
        self.length += n
        if scored == 0:
            return {}
        ends = self._weights("ends", architecture.end_tensors | {"output": architecture.output_tensor})
        return {
            name: architecture.finish_logits(
                products(architecture.final_norm(x[-(scored or n) :], ends), ends["output"]),
                range(architecture.sizes.vocabulary),
                ends,
            )
            for name, x in states.items()
        }

    def _weights(self, group: str, tensors: dict[str, str]) -> dict[str, torch.Tensor]:
        if group in self._kept:
            return self._kept[group]
        found = {short: self.stream.take(name) for short, name in tensors.items()}
        if self.keep_weights:
            self._kept[group] = found
        return found


class _StepRows:
    """`TokenRows` of a step's tokens, decoding their rows alone."""

    def __init__(self, stepper: Stepper, tokens: torch.Tensor) -> None:
        self.stepper, self.tokens = stepper, tokens

    def of_tokens(self, name: str) -> torch.Tensor:
        stream = self.stepper.stream
        return torch.cat([stream.take(name, slice(t, t + 1)) for t in self.tokens.tolist()])

    def weights(self, name: str) -> torch.Tensor:
        return self.stepper._weights(name, {name: name})[name]


def weight_bytes(architecture: Architecture) -> int:
    """Memory that the weights of all layers and of the output take, decoded; experts left out."""
    names = {architecture.output_tensor, *architecture.end_tensors.values()}
    for layer in range(architecture.sizes.layers):
        names |= set(architecture.layer_tensors(layer).values())
    return sum(4 * math.prod(architecture.file.tensors[name].shape) for name in names)


@dataclass
class _Cache:
    """Keys and values of one layer and arm, in buffers that double when they are full.

    indexed: the keys of an indexer, where there is one.
    """

    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    length: int = 0
    indexed: torch.Tensor | None = None

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values [length, Hkv, D], these behind those before: views, written to no more unless
        the sequence is cut."""
        self.k, self.v = (_with(old, self.length, new) for old, new in ((self.k, k), (self.v, v)))
        self.length += len(k)
        return self.held()

    def index(self, inputs: IndexerInputs) -> IndexerInputs:
        """After `append`: the same tokens' indexer inputs, as of one sequence, with all keys so far."""
        self.indexed = _with(self.indexed, self.length - len(inputs.k), inputs.k)
        return IndexerInputs(inputs.q[None], self.indexed[None, : self.length], inputs.weights[None])

    def held(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values so far [length, Hkv, D]: views."""
        assert self.k is not None
        assert self.v is not None
        return self.k[: self.length], self.v[: self.length]

    def copy(self) -> _Cache:
        assert self.k is not None
        assert self.v is not None
        indexed = None if self.indexed is None else self.indexed.clone()
        return _Cache(self.k.clone(), self.v.clone(), self.length, indexed)


def _with(buffer: torch.Tensor | None, length: int, new: torch.Tensor) -> torch.Tensor:
    """The buffer, or a larger one, with `new` after its first `length` rows."""
    end = length + len(new)
    if buffer is None or len(buffer) < end:
        larger = new.new_empty((max(2 * length, end, _FIRST_ROOM), *new.shape[1:]))
        if buffer is not None:
            larger[:length] = buffer[:length]
        buffer = larger
    buffer[length:end] = new
    return buffer
