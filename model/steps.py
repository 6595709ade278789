"""The other driver: token by token with a cache, as text is generated.

    x of the new tokens --layer--> k, v appended to the layer's cache; attention of the new tokens over it

Layers are those of `model.runner`, and so is the one rounding of q, k and v. The cache is what a layer's keys
and values were, in the run's attention type, one sequence long.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from model.architectures.architecture import Architecture
from model.errors import ModelError
from model.products import Products, tile_rows
from model.runner import ATTENTION_TYPES, LayerCall, round_inputs
from model.stopwatch import Stopwatch
from model.stream import TensorStream

Attend = Callable[[LayerCall], torch.Tensor]


class Stepper:
    """One sequence of one model. `attend` computes attention: a call to [1, T, H, Dv] float32.

    Weights are dequantized again for every step unless `keep_weights`, which small models can afford. Experts
    are always decoded when they are chosen.
    """

    def __init__(
        self,
        architecture: Architecture,
        attend: Attend,
        *,
        device: torch.device,
        attention_type: str = "f16",
        keep_weights: bool = True,
    ) -> None:
        self.architecture, self.attend, self.device = architecture, attend, device
        self.attention_type = ATTENTION_TYPES[attention_type]
        self.keep_weights = keep_weights
        self.stopwatch = Stopwatch(device)
        self.products = Products(0, self.stopwatch)
        self.stream = TensorStream(architecture.file, device, self.stopwatch)
        self.length = 0
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._kept: dict[str, dict[str, torch.Tensor]] = {}

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append tokens [T] to the sequence and give their logits [T, vocabulary] float32.

        Raises ModelError where there are none, or one is not of the vocabulary.
        """
        architecture, n = self.architecture, len(tokens)
        if n == 0 or int(tokens.min()) < 0 or int(tokens.max()) >= architecture.sizes.vocabulary:
            raise ModelError(f"tokens: expected at least one, all below {architecture.sizes.vocabulary}")
        products = self.products.with_tile(tile_rows(n))
        positions = torch.arange(self.length, self.length + n, device=self.device)
        kv_len = (positions + 1).to(torch.int32)[None]
        x = self._rows_of_embedding(tokens) * architecture.embedding_scale
        for layer in range(architecture.sizes.layers):
            weights = self._weights(f"layer {layer}", architecture.layer_tensors(layer))
            inputs = architecture.attention_inputs(layer, x, positions, weights, products)
            q, k, v = round_inputs(inputs, self.attention_type)
            k, v = self._append(layer, k, v)
            call = LayerCall(
                layer, 0, q[None], k[None], v[None], kv_len, architecture.attention_settings(layer)
            )
            x = architecture.after_attention(layer, x, self.attend(call)[0], weights, products)
            states = {0: x}
            architecture.feed_forward(layer, states, weights, products, self.stream)
            x = states[0]
        self.length += n
        ends = self._weights("ends", architecture.norm_tensors | {"output": architecture.output_tensor})
        return products(architecture.final_norm(x, ends), ends["output"])

    def _append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's keys and values with the new ones behind them."""
        if layer == len(self._cache):
            self._cache.append((k, v))
        else:
            old_k, old_v = self._cache[layer]
            self._cache[layer] = (torch.cat((old_k, k)), torch.cat((old_v, v)))
        return self._cache[layer]

    def _weights(self, group: str, tensors: dict[str, str]) -> dict[str, torch.Tensor]:
        if group in self._kept:
            return self._kept[group]
        found = {short: self.stream.take(name) for short, name in tensors.items()}
        if self.keep_weights:
            self._kept[group] = found
        return found

    def _rows_of_embedding(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T, width], decoding the rows of these tokens alone."""
        name = self.architecture.embedding_tensor
        return torch.cat([self.stream.take(name, slice(t, t + 1)) for t in tokens.tolist()])
