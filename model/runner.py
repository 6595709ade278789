"""The reference runner: groups of windows outside, layers inside, every arm at once.

For each layer the weights are dequantized once, applied to every arm and window, and dropped. Everything but
attention is float32 (or float64, if asked) on fixed row tiles; attention is each arm's own. q, k and v are
rounded once, by `round_inputs`, to the run's attention type: what an engine's cast does, and the same for
every arm. The output matrix comes in slices of its rows, so that logits of the whole vocabulary never lie in
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch

from model.architectures.architecture import Architecture, AttentionInputs, AttentionSettings
from model.products import Products, Tiling, tile_rows, tiling_of
from model.stopwatch import Stopwatch
from model.stream import Piece, Share, TensorStream

# First window of a slab, name of the arm.
State = tuple[int, str]
ATTENTION_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
# Of everything but attention.
COMPUTE_TYPES = {"f32": torch.float32, "f64": torch.float64}
# Rows of a tile of logits at most, and rows of the embedding or output matrix decoded at once.
CPU_LOGIT_ROWS, GPU_LOGIT_ROWS = 128, 2048
VOCABULARY_ROWS = 8192
# Rows of a tile where all arms but the prompt compute the end of a window: the least, and a GPU's.
LEAST_TILE, GPU_REST_TILE = 128, 2048


class LayerCall(NamedTuple):
    """One attention call of B consecutive windows, `window` the number of the first in the run.

    q [B, T, H, Dk], k and v [B, S, Hkv, D] already rounded, kv_len [B, T]; S = T, and more where a prompt
    comes before the rows. unrounded: q, k and v, of the same shapes, before they were; x [B, T, width]: the
    residual stream that enters the layer. None in drivers that keep neither.
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
    """One pass of the model. `attend` returns [B, T, H, Dv] float32, or None where the arm has failed."""

    name: str

    def attend(self, call: LayerCall) -> torch.Tensor | None: ...


class LogitSlice(NamedTuple):
    """Logits of some scored positions for some of the vocabulary: arm name -> [tile, vocabulary].

    The group's scored positions, window by window, are its rows; `rows` are the ones of this slice, and
    tensors have as many rows as a tile, those beyond len(rows) of no meaning. block: number of the row range,
    the same for each part of the vocabulary; all row ranges come before the next part. The tensors are
    overwritten by the next slice.
    """

    block: int
    rows: range
    vocabulary: range
    logits: dict[str, torch.Tensor]


class Progress(Protocol):
    """Called with units of work done out of all of the group."""

    def __call__(self, done: int, total: int) -> None: ...


class Runner:
    """One model on one device.

    attention_type: what q, k and v are rounded to; share: see `TensorStream`; compute: the type of everything
    but attention; gpus: how many of an engine's share each layer (`Products.summed`), for every arm alike.
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
    ) -> None:
        self.architecture = architecture
        self.device = device
        self.attention_type = ATTENTION_TYPES[attention_type]
        self.stopwatch = Stopwatch(device)
        self.products = Products(0, self.stopwatch, gpus)
        self.stream = TensorStream(
            architecture.file, device, self.stopwatch, share=share, dtype=COMPUTE_TYPES[compute]
        )

    def tiling(self, n_ctx: int, rest: int | None = None) -> Tiling:
        """How windows of n_ctx tokens are computed together; `rest`: of those, the ones after a prompt."""
        if rest is None:
            return tiling_of(n_ctx, self.architecture.sizes.width, self.device)
        if self.device.type == "cpu":
            return Tiling(tile_rows(max(rest, LEAST_TILE)), 1)
        return Tiling(GPU_REST_TILE, max(GPU_REST_TILE // rest, 1))

    def run_group(
        self,
        tokens: torch.Tensor,
        arms: Sequence[Arm],
        *,
        scored: range,
        first_window: int = 0,
        progress: Progress | None = None,
        whole_vocabulary: bool = False,
        tiling: Tiling | None = None,
        prompt: Arm | None = None,
    ) -> Iterator[LogitSlice]:
        """Run every arm over windows [W, T] of tokens, then give their logits at the scored positions.

        An arm whose `attend` returns None takes no further part. first_window: number of the group's first
        window in the run, passed on in calls. whole_vocabulary: one slice holds it all, whatever memory that
        takes. tiling: instead of the device's own. prompt: computes the positions before the scored ones once
        for all arms, which then compute the rest over its keys and values.
        """
        windows, n_ctx = tokens.shape
        sizes = self.architecture.sizes
        tiling = tiling or self.tiling(n_ctx, None if prompt is None else n_ctx - scored.start)
        products = self.products.with_tile(tiling.rows)
        slabs = [
            range(first, min(first + tiling.windows, windows)) for first in range(0, windows, tiling.windows)
        ]
        first = scored.start if prompt is not None else 0
        arms = [prompt, *arms] if prompt is not None and first else list(arms)
        # What each arm computes of a window: the prompt its beginning, all others the rest.
        spans = {arm.name: range(first) if arm is prompt else range(first, n_ctx) for arm in arms}
        positions, kv_lens = self._positions(slabs, sorted(set(spans.values()), key=lambda s: s.start))
        output_rows = sizes.vocabulary if whole_vocabulary else VOCABULARY_ROWS
        self.stream.forget()
        live = [arm.name for arm in arms]
        # Hidden states by slab and arm, [B * T, width]; those of an arm that fails are dropped.
        hidden: dict[State, torch.Tensor] = {}
        for slab, start in zip(slabs, self._embed(tokens.to(self.device), slabs), strict=True):
            by_window = start.unflatten(0, (len(slab), n_ctx))
            for name, span in spans.items():
                hidden[slab.start, name] = by_window[:, span.start : span.stop].flatten(0, 1)
        steps = (sizes.layers * windows + windows) * len(arms)
        done = 0
        for layer in range(sizes.layers):
            later = self.architecture.feed_forward_tensors(layer)
            held = self.architecture.layer_tensors(layer)
            weights: dict[str, torch.Tensor] = {}
            weights = self._weights({short: name for short, name in held.items() if short not in later})
            self.stream.ahead(Piece(name) for name in later.values())
            settings = self.architecture.attention_settings(layer)
            for slab in slabs:
                count = len(slab)
                for arm in arms:
                    done += count
                    if arm.name not in live:
                        continue
                    x = hidden[slab.start, arm.name]
                    span = spans[arm.name]
                    with self.stopwatch.time("elementwise"):
                        flat = self.architecture.attention_inputs(
                            layer, x, positions[count, span], weights, products
                        )
                        inputs = AttentionInputs(*(t.unflatten(0, (count, len(span))) for t in flat))
                        if arm is prompt:
                            before = inputs
                        elif first:
                            inputs = after(before, inputs)
                        q, k, v = round_inputs(inputs, self.attention_type)
                    x_in, kv_len = x.unflatten(0, (count, len(span))), kv_lens[count, span]
                    call = LayerCall(
                        layer, first_window + slab.start, q, k, v, kv_len, settings, inputs, x_in
                    )
                    with self.stopwatch.time(f"attention {arm.name}"):
                        o = arm.attend(call)
                    if o is None:
                        live.remove(arm.name)
                        hidden = {state: kept for state, kept in hidden.items() if state[1] != arm.name}
                        continue
                    with self.stopwatch.time("elementwise"):
                        hidden[slab.start, arm.name] = self.architecture.after_attention(
                            layer, x, o.flatten(0, 1).to(x.dtype), weights, products
                        )
                if progress:
                    progress(done, steps)
            weights = {}
            weights = self._weights(later)
            self._read_ahead(layer + 1, output_rows)
            with self.stopwatch.time("elementwise"):
                self.architecture.feed_forward(layer, hidden, weights, products, self.stream)
            weights = {}
        if first and prompt is not None:
            live.remove(prompt.name)
        rows = range(scored.start - first, scored.stop - first)
        yield from self._logits(hidden, live if slabs else [], rows, slabs, n_ctx - first, output_rows)
        if progress:
            progress(steps, steps)

    def _positions(
        self, slabs: Sequence[range], spans: Sequence[range]
    ) -> tuple[dict[tuple[int, range], torch.Tensor], dict[tuple[int, range], torch.Tensor]]:
        """Positions [B * T] and visible keys [B, T] of slabs of B windows, by B and span of a window."""
        positions, kv_lens = {}, {}
        for span in spans:
            one = torch.arange(span.start, span.stop, device=self.device)
            for count in sorted({len(slab) for slab in slabs}):
                positions[count, span] = one.repeat(count)
                kv_lens[count, span] = (one + 1).to(torch.int32).expand(count, -1).contiguous()
        return positions, kv_lens

    def _logits(
        self,
        hidden: dict[State, torch.Tensor],
        live: Sequence[str],
        scored: range,
        slabs: Sequence[range],
        n_ctx: int,
        output_rows: int,
    ) -> Iterator[LogitSlice]:
        architecture = self.architecture
        weights = self._weights(architecture.norm_tensors)
        normed: dict[str, list[torch.Tensor]] = {name: [] for name in live}
        for slab in slabs:
            for name in live:
                x = hidden.pop((slab.start, name)).unflatten(0, (len(slab), n_ctx))
                x = x[:, scored.start : scored.stop].flatten(0, 1)
                normed[name].append(architecture.final_norm(x, weights))
        rows_of = {name: torch.cat(parts) for name, parts in normed.items()}
        del normed
        total = len(scored) * (slabs[-1].stop if slabs else 0)
        if self.device.type == "cpu":
            # Tiles of one window each, as everywhere on a CPU.
            tile = min(CPU_LOGIT_ROWS, tile_rows(len(scored)))
            spans = [range(first, first + len(scored)) for first in range(0, total, len(scored))]
        else:
            tile, spans = GPU_LOGIT_ROWS, [range(total)]
        blocks = [span[first : first + tile] for span in spans for first in range(0, len(span), tile)]
        products = self.products.with_tile(tile)
        vocabulary = architecture.sizes.vocabulary
        for first in range(0, vocabulary, output_rows):
            part = range(first, min(first + output_rows, vocabulary))
            output = self.stream.take(architecture.output_tensor, slice(part.start, part.stop))
            buffers = {name: output.new_empty((tile, len(part))) for name in live}
            for block, rows in enumerate(blocks):
                for name in live:
                    products(rows_of[name][rows.start : rows.stop], output, out=buffers[name])
                yield LogitSlice(block, rows, part, buffers)

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
                *(Piece(name) for name in architecture.norm_tensors.values()),
                *(
                    Piece(architecture.output_tensor, (first, min(first + output_rows, vocabulary)))
                    for first in range(0, vocabulary, output_rows)
                ),
            ]
        )

    def _embed(self, tokens: torch.Tensor, slabs: Sequence[range]) -> list[torch.Tensor]:
        """Rows of the embedding matrix [B * T, width] by slab, decoding a slice of the matrix at a time."""
        name, sizes, n_ctx = self.architecture.embedding_tensor, self.architecture.sizes, tokens.shape[1]
        found, place = tokens.flatten().long().unique(return_inverse=True)
        parts = []
        for first in range(0, sizes.vocabulary, VOCABULARY_ROWS):
            mine = found[(found >= first) & (found < first + VOCABULARY_ROWS)]
            # Processes that share their reading may need different rows: then all are read.
            if len(mine) or self.stream.share is not None:
                part = self.stream.take(name, slice(first, first + VOCABULARY_ROWS))
                parts.append(part[mine - first])
        rows = torch.cat(parts) * self.architecture.embedding_scale
        return [rows[place[slab.start * n_ctx : slab.stop * n_ctx]] for slab in slabs]


def after(before: AttentionInputs, inputs: AttentionInputs) -> AttentionInputs:
    """Inputs whose keys and values come after those of a prompt: q [B, T, H, Dk], k and v [B, S, Hkv, D]."""
    k, v = (torch.cat((a, b), 1) for a, b in ((before.k, inputs.k), (before.v, inputs.v)))
    return AttentionInputs(inputs.q, k, v)


def round_inputs(inputs: AttentionInputs, to: torch.dtype) -> AttentionInputs:
    """The one rounding of q, k and v to the run's attention type, the same for every arm."""
    return AttentionInputs(*(x.to(to) for x in inputs))
