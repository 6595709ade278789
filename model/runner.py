"""The reference runner: groups of windows outside, layers inside, every arm at once.

For each layer the weights are dequantized once, applied to every arm and window, and dropped. Everything but
attention is float32 on fixed row tiles; attention is each arm's own. q, k and v are rounded once, by
`round_inputs`, to the run's attention type: what an engine's cast does, and the same for every arm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from model.architectures.architecture import Architecture, AttentionInputs, AttentionSettings
from model.dequantize import dequantize
from model.products import Products, Stopwatch, tile_rows

# Window of the group, name of the arm.
State = tuple[int, str]
ATTENTION_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
# Rows of logits held at once for every arm, and rows of the embedding matrix decoded at once.
LOGIT_ROWS = 128
EMBEDDING_ROWS = 8192


class LayerCall(NamedTuple):
    """One attention call of one window: q [1, T, H, Dk], k and v [1, T, Hkv, D] already rounded.

    unrounded: the same before they were; x [T, width]: the residual stream that enters the layer. None in
    drivers that keep neither.
    """

    layer: int
    window: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_len: torch.Tensor
    settings: AttentionSettings
    unrounded: AttentionInputs | None = None
    x: torch.Tensor | None = None


class Arm(Protocol):
    """One pass of the model. `attend` returns [1, T, H, Dv] float32, or None where the arm has failed."""

    name: str

    def attend(self, call: LayerCall) -> torch.Tensor | None: ...


class LogitSlice(NamedTuple):
    """Logits of some scored positions of one window: arm name -> [rows, vocabulary] float32.

    window: index in the whole run; positions: the scored positions. The tensors are overwritten by the next
    slice.
    """

    window: int
    positions: range
    logits: dict[str, torch.Tensor]


class Progress(Protocol):
    """Called with units of work done out of all of the group."""

    def __call__(self, done: int, total: int) -> None: ...


class Runner:
    """One model on one device."""

    def __init__(self, architecture: Architecture, *, device: torch.device, attention_type: str = "f16"):
        self.architecture = architecture
        self.device = device
        self.attention_type = ATTENTION_TYPES[attention_type]
        self.stopwatch = Stopwatch(device)

    def run_group(
        self,
        tokens: torch.Tensor,
        arms: Sequence[Arm],
        *,
        scored: range,
        first_window: int = 0,
        progress: Progress | None = None,
    ) -> Iterator[LogitSlice]:
        """Run every arm over windows [W, T] of tokens, then give their logits at the scored positions.

        An arm whose `attend` returns None takes no further part. first_window: number of the group's first
        window in the run, passed on in calls and slices.
        """
        windows, n_ctx = tokens.shape
        sizes = self.architecture.sizes
        products = Products(tile_rows(n_ctx), self.stopwatch)
        positions = torch.arange(n_ctx, device=self.device)
        kv_len = torch.arange(1, n_ctx + 1, dtype=torch.int32, device=self.device)[None]
        live = [arm.name for arm in arms]
        # Hidden states by window and arm; those of an arm that fails are dropped.
        hidden: dict[State, torch.Tensor] = {}
        for w, start in enumerate(self._embed(tokens)):
            for name in live:
                hidden[w, name] = start.clone()
        steps = (sizes.layers * windows + windows) * len(arms)
        done = 0
        for layer in range(sizes.layers):
            with self.stopwatch.time("weights"):
                weights = self._weights(self.architecture.layer_tensors(layer))
            settings = self.architecture.attention_settings(layer)
            for w in range(windows):
                for arm in arms:
                    done += 1
                    if arm.name not in live:
                        continue
                    x = hidden[w, arm.name]
                    inputs = self.architecture.attention_inputs(layer, x, positions, weights, products)
                    q, k, v = (t[None] for t in round_inputs(inputs, self.attention_type))
                    call = LayerCall(layer, first_window + w, q, k, v, kv_len, settings, inputs, x)
                    with self.stopwatch.time("attention"):
                        o = arm.attend(call)
                    if o is None:
                        live.remove(arm.name)
                        hidden = {state: kept for state, kept in hidden.items() if state[1] != arm.name}
                        continue
                    hidden[w, arm.name] = self.architecture.after_attention(layer, x, o[0], weights, products)
                if progress:
                    progress(done, steps)
            self.architecture.feed_forward(layer, hidden, weights, products)
        yield from self._logits(hidden, live, scored, first_window, windows)
        if progress:
            progress(steps, steps)

    def _logits(
        self,
        hidden: dict[State, torch.Tensor],
        live: Sequence[str],
        scored: range,
        first_window: int,
        windows: int,
    ) -> Iterator[LogitSlice]:
        with self.stopwatch.time("weights"):
            weights = self._weights(self.architecture.norm_tensors)
            output = dequantize(self.architecture.file, self.architecture.output_tensor, device=self.device)
        rows = min(LOGIT_ROWS, tile_rows(len(scored)))
        products = Products(rows, self.stopwatch)
        buffers = {name: torch.empty((rows, output.shape[0]), device=self.device) for name in live}
        for w in range(windows):
            for first in range(0, len(scored), rows):
                positions = scored[first : first + rows]
                logits = {}
                for name in live:
                    x = hidden[w, name][positions.start : positions.stop]
                    logits[name] = products(
                        self.architecture.final_norm(x, weights), output, out=buffers[name]
                    )
                yield LogitSlice(first_window + w, positions, logits)

    def _weights(self, tensors: dict[str, str]) -> dict[str, torch.Tensor]:
        file = self.architecture.file
        return {short: dequantize(file, name, device=self.device) for short, name in tensors.items()}

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding matrix [W, T, width], decoding a slice of the matrix at a time."""
        name, sizes = self.architecture.embedding_tensor, self.architecture.sizes
        out = torch.empty((*tokens.shape, sizes.width), dtype=torch.float32)
        for first in range(0, sizes.vocabulary, EMBEDDING_ROWS):
            last = min(first + EMBEDDING_ROWS, sizes.vocabulary)
            chosen = (tokens >= first) & (tokens < last)
            if chosen.any():
                part = dequantize(self.architecture.file, name, rows=slice(first, last))
                out[chosen] = part[tokens[chosen].long() - first]
        return out.to(self.device) * self.architecture.embedding_scale


def round_inputs(inputs: AttentionInputs, to: torch.dtype) -> AttentionInputs:
    """The one rounding of q, k and v to the run's attention type, the same for every arm."""
    return AttentionInputs(*(x.to(to) for x in inputs))
