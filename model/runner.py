"""The reference runner: groups of windows outside, layers inside, every arm at once.

For each layer the weights are dequantized once, applied to every arm and window (`group`), and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch

from verify.kernels.cache_types import run_cache
from verify.model.architectures.architecture import Architecture
from verify.model.first_rows import FirstRows, first_rows
from verify.model.group import Group, positions_of, slabs_of
from verify.model.layer_call import AttentionPass
from verify.model.logits import VOCABULARY_ROWS, LogitSlice, State, logit_slices
from verify.model.products import Products, Tiling, tile_rows, tiling_of
from verify.model.stopwatch import Stopwatch
from verify.model.stream import Piece, Share, TensorStream

# Of everything but attention.
COMPUTE_TYPES = {"f32": torch.float32, "f64": torch.float64}
# Rows of a tile where all arms but the prompt compute the end of a window: the least, and a GPU's.
LEAST_TILE, GPU_REST_TILE = 128, 2048


class Progress(Protocol):
    """Called with units of work done out of all of the group."""

    def __call__(self, done: int, total: int) -> None: ...


class Runner:
    """One model on one device.

    side_by_side: windows that are computed together, whatever the device would have; 0: as it would.
    attention_type: what q, k and v are rounded to, and the cache that keys and values pass (`run_cache`);
    share: see `TensorStream`; compute: the type of everything but attention; gpus: how many of an engine's
    share each layer (`Products.summed`), for every arm alike.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        device: torch.device,
        attention_type: str = "f16",
        share: Share | None = None,
        compute: str = "f32",
        gpus: int = 1,
        side_by_side: int = 0,
    ) -> None:
        self.architecture = architecture
        self.device, self.side_by_side = device, side_by_side
        self.attention_type = run_cache(attention_type)
        self.stopwatch: Stopwatch[str] = Stopwatch(device)
        self.products = Products(0, self.stopwatch, gpus)
        self.stream = TensorStream(
            architecture.file, device, self.stopwatch, share=share, dtype=COMPUTE_TYPES[compute]
        )

    def tiling(self, n_ctx: int, rest: int | None = None) -> Tiling:
        """How windows of n_ctx tokens are computed together; `rest`: of those, the ones after a prompt."""
        if rest is None:
            found = tiling_of(n_ctx, self.architecture.sizes.width, self.device)
        elif self.device.type == "cpu":
            found = Tiling(tile_rows(max(rest, LEAST_TILE)), 1)
        else:
            found = Tiling(GPU_REST_TILE, max(GPU_REST_TILE // rest, 1))
        return found._replace(windows=self.side_by_side or found.windows)

    def run_group(
        self,
        tokens: torch.Tensor,
        arms: Sequence[AttentionPass],
        *,
        scored: range,
        first_window: int = 0,
        progress: Progress | None = None,
        whole_vocabulary: bool = False,
        tiling: Tiling | None = None,
        prompt: AttentionPass | None = None,
        takes: Callable[[str, int], bool] | None = None,
        layer_done: Callable[[int, dict[State, torch.Tensor]], None] | None = None,
        begin: tuple[int, dict[State, torch.Tensor]] | None = None,
        watch: Callable[[int, dict[State, torch.Tensor]], None] | None = None,
    ) -> Iterator[LogitSlice]:
        """Run every arm over windows [W, T] of tokens, then give their logits at the scored positions.

        An arm whose `attend` returns None takes no further part. first_window: number of the group's first
        window in the run, passed on in calls. whole_vocabulary: one slice holds it all, whatever memory that
        takes. tiling: instead of the device's own. prompt: computes the positions before the scored ones once
        for all arms, which then compute the rest over its keys and values. takes: whether the arm of this
        name runs the windows computed together whose first is this one, numbered as in the run; else it does.
        layer_done: called with how many layers are done, and the hidden states after them; begin: to go on
        from what it was called with, which is not after every layer where layers share keys. watch: called
        with the same, after every layer and before the first.
        """
        self.architecture.check_tokens(tokens.flatten())
        windows, n_ctx = tokens.shape
        self.architecture.check_length(n_ctx)
        layers, vocabulary = self.architecture.sizes.layers, self.architecture.sizes.vocabulary
        tiling = tiling or self.tiling(n_ctx, None if prompt is None else n_ctx - scored.start)
        first = scored.start if prompt is not None else 0
        if prompt is not None and first:
            arms = [prompt, *arms]
        # What each arm computes of a window: the prompt its beginning, all others the rest.
        spans = {arm.name: range(first) if arm is prompt else range(first, n_ctx) for arm in arms}
        slabs = slabs_of(first_window, windows, tiling.windows)
        distinct = sorted(set(spans.values()), key=lambda span: span.start)
        positions, kv_lens = positions_of(slabs, distinct, self.device)
        group = Group(
            architecture=self.architecture,
            stream=self.stream,
            stopwatch=self.stopwatch,
            attention_type=self.attention_type,
            slabs=slabs,
            arms=list(arms),
            prompt=prompt,
            spans=spans,
            first_window=first_window,
            products=self.products.with_tile(tiling.rows),
            positions=positions,
            kv_lens=kv_lens,
        )
        taken = {
            slab.start: [n for n in spans if takes is None or takes(n, first_window + slab.start)]
            for slab in slabs
        }
        output_rows = vocabulary if whole_vocabulary else VOCABULARY_ROWS
        self.stream.forget()
        hidden: dict[State, torch.Tensor]
        layers_done = 0 if begin is None else begin[0]
        rows_in = FirstRows([], None, {}, n_ctx)
        if begin is None or self.architecture.own_size:
            rows_in = first_rows(self.architecture, self.stream, self.products, tokens.to(self.device), slabs)
        if begin is None:
            hidden = group.first_states(rows_in.states, n_ctx, taken)
        else:
            hidden = dict(begin[1])
        if watch is not None:
            watch(layers_done, hidden)
        # Units of work of a slab in a layer: one a window and arm.
        units = {slab.start: len(slab) * len(taken[slab.start]) for slab in slabs}
        done, steps = layers_done * sum(units.values()), (layers + 1) * sum(units.values())
        for layer in range(layers_done, layers):
            later = self.architecture.feed_forward_tensors(layer)
            held = self.architecture.layer_tensors(layer)
            weights: dict[str, torch.Tensor] = {}
            weights = self._weights({short: name for short, name in held.items() if short not in later})
            self.stream.ahead(Piece(name) for name in later.values())
            for slab in slabs:
                if self.architecture.attends(layer):
                    group.attention(layer, slab, hidden, weights)
                else:
                    group.without_attention(layer, slab, hidden, weights)
                done += units[slab.start]
                if progress:
                    progress(done, steps)
            weights = {}
            weights = self._weights(later)
            self._read_ahead(layer + 1, output_rows)
            with self.stopwatch.time("elementwise"):
                own = partial(rows_in.own_of, layer, spans) if rows_in.own is not None else None
                hidden = group.feed_forward(layer, hidden, weights, own)
            weights = {}
            group.forget(layer)
            if watch is not None:
                watch(layer + 1, hidden)
            # To go on after this layer, its states must be enough.
            if layer_done is not None and not self.architecture.wanted_later(layer):
                layer_done(layer + 1, hidden)
        if first and prompt is not None:
            hidden = {state: x for state, x in hidden.items() if state[1] != prompt.name}
        rows = range(scored.start - first, scored.stop - first)
        yield from self._logits(hidden, rows, slabs, n_ctx - first, output_rows)
        if progress:
            progress(steps, steps)

    def _logits(
        self,
        hidden: dict[State, torch.Tensor],
        scored: range,
        slabs: Sequence[range],
        n_ctx: int,
        output_rows: int,
    ) -> Iterator[LogitSlice]:
        architecture = self.architecture
        weights = self._weights(architecture.end_tensors)
        vocabulary = architecture.sizes.vocabulary
        normed: dict[int, torch.Tensor] = {}
        states: dict[State, torch.Tensor] = {}
        for (start, name), x in hidden.items():
            if id(x) not in normed:
                mine = x.unflatten(0, (-1, n_ctx))[:, scored.start : scored.stop].flatten(0, 1)
                normed[id(x)] = architecture.final_norm(mine, weights)
            states[start, name] = normed[id(x)]
        hidden.clear()
        del normed
        yield from logit_slices(
            states,
            slabs,
            scored=len(scored),
            parts=[range(at, min(at + output_rows, vocabulary)) for at in range(0, vocabulary, output_rows)],
            output=lambda part: self.stream.take(architecture.output_tensor, slice(part.start, part.stop)),
            finish=lambda logits, part: architecture.finish_logits(logits, part, weights),
            products=self.products,
        )

    def _weights(self, tensors: dict[str, str]) -> dict[str, torch.Tensor]:
        return {short: self.stream.take(name) for short, name in tensors.items()}

    def _read_ahead(self, layer: int, output_rows: int) -> None:
        """Announce what is taken after a layer: tensors of the next, or the output matrix in parts."""
        architecture = self.architecture
        if layer < architecture.sizes.layers:
            later = architecture.feed_forward_tensors(layer)
            held = architecture.layer_tensors(layer)
            self.stream.ahead(Piece(name) for short, name in held.items() if short not in later)
            return
        vocabulary = architecture.sizes.vocabulary
        self.stream.ahead(
            [
                *(Piece(name) for name in architecture.end_tensors.values()),
                *(
                    Piece(architecture.output_tensor, (first, min(first + output_rows, vocabulary)))
                    for first in range(0, vocabulary, output_rows)
                ),
            ]
        )
