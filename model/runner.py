"""The reference runner: groups of windows outside, layers inside, every arm at once.

For each layer the weights are dequantized once, applied to every arm and window, and dropped. Everything but
attention is float32 (or float64, if asked) on fixed row tiles; attention is each arm's own. q, k and v are
rounded once, by `round_inputs`, to the run's attention type: what an engine's cast does, and the same for
every arm. All arms begin with one hidden state; it is one tensor, computed once, until their attention gives
other bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch

from verify.kernels.bits import same_bits
from verify.kernels.cache_types import RunCache, run_cache
from verify.kernels.lengths import keep_lengths
from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.stored import kept
from verify.model.architectures.architecture import Architecture, AttentionInputs, AttentionSettings, Weights
from verify.model.logits import VOCABULARY_ROWS, LogitSlice, State, logit_slices
from verify.model.products import Products, Tiling, tile_rows, tiling_of
from verify.model.stopwatch import Stopwatch
from verify.model.stream import Piece, Share, TensorStream

# Of everything but attention.
COMPUTE_TYPES = {"f32": torch.float32, "f64": torch.float64}
# Rows of a tile where all arms but the prompt compute the end of a window: the least, and a GPU's.
LEAST_TILE, GPU_REST_TILE = 128, 2048
# Rows of a tile where tokens' own vectors are made, once a group.
OWN_TILE = 512


class LayerCall(NamedTuple):
    """One attention call of B consecutive windows. S = T, and more where a prompt comes before the rows."""

    layer: int  # counted from 0
    window: int  # number of the first one in the run
    q: torch.Tensor  # [B, T, H, Dk], rounded
    k: torch.Tensor  # [B, S, Hkv, Dk], rounded
    v: torch.Tensor  # [B, S, Hkv, Dv], rounded
    kv_len: torch.Tensor  # visible keys, [B, T]
    settings: AttentionSettings  # of the layer
    unrounded: AttentionInputs | None = None  # q, k and v before they were; None: the driver keeps none
    x: torch.Tensor | None = None  # [B, T, width], the residual stream that enters the layer; likewise


class AttentionPass(Protocol):
    """One pass of the model. `attend` returns [B, T, H, Dv] float32, or None where the arm has failed."""

    name: str

    def attend(self, call: LayerCall) -> torch.Tensor | None: ...


class Progress(Protocol):
    """Called with units of work done out of all of the group."""

    def __call__(self, done: int, total: int) -> None: ...


class _Group(NamedTuple):
    """What does not change while a group runs."""

    slabs: list[range]  # windows that are computed together
    arms: list[AttentionPass]  # of the run
    prompt: AttentionPass | None  # what is before the scored rows; None: nothing
    spans: dict[str, range]  # what each arm computes of a window
    first_window: int  # number in the run
    products: Products  # on the tiles of its slabs
    positions: dict[tuple[int, range], torch.Tensor]  # [B * T], by B, the windows of a slab, and span
    kv_lens: dict[tuple[int, range], torch.Tensor]  # [B, T], likewise
    # Inputs of layers whose keys and values later layers read, by layer, slab and arm.
    kept: dict[tuple[int, int, str], AttentionInputs]


class Runner:
    """One model on one device.

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
    ) -> None:
        self.architecture = architecture
        self.device = device
        self.attention_type = run_cache(attention_type)
        self.stopwatch: Stopwatch[str] = Stopwatch(device)
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
        slabs = _slabs(first_window, windows, tiling.windows)
        positions, kv_lens = self._positions(slabs, sorted(set(spans.values()), key=lambda span: span.start))
        group = _Group(
            slabs=slabs,
            arms=list(arms),
            prompt=prompt,
            spans=spans,
            first_window=first_window,
            products=self.products.with_tile(tiling.rows),
            positions=positions,
            kv_lens=kv_lens,
            kept={},
        )
        taken = {
            slab.start: [n for n in spans if takes is None or takes(n, first_window + slab.start)]
            for slab in slabs
        }
        output_rows = vocabulary if whole_vocabulary else VOCABULARY_ROWS
        self.stream.forget()
        # Hidden states by slab and arm, [B * T, width]; those of an arm that fails are dropped.
        hidden: dict[State, torch.Tensor]
        layers_done = 0 if begin is None else begin[0]
        first_rows = _FirstRows([], None, {}, n_ctx)
        if begin is None or self.architecture.own_size:
            first_rows = self._embed(tokens.to(self.device), slabs)
        if begin is None:
            hidden = self._first_states(first_rows.states, n_ctx, group, taken)
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
                    self._attention(layer, slab, group, hidden, weights)
                else:
                    self._without_attention(layer, slab, group, hidden, weights)
                done += units[slab.start]
                if progress:
                    progress(done, steps)
            weights = {}
            weights = self._weights(later)
            self._read_ahead(layer + 1, output_rows)
            with self.stopwatch.time("elementwise"):
                own = partial(first_rows.own_of, layer, spans)
                hidden = self._feed_forward(
                    layer, hidden, weights, group.products, None if first_rows.own is None else own
                )
            weights = {}
            wanted = self.architecture.wanted_later(layer)
            for unwanted in [key for key in group.kept if key[0] not in wanted]:
                del group.kept[unwanted]
            if watch is not None:
                watch(layer + 1, hidden)
            # To go on after this layer, its states must be enough.
            if layer_done is not None and not wanted:
                layer_done(layer + 1, hidden)
        if first and prompt is not None:
            hidden = {state: x for state, x in hidden.items() if state[1] != prompt.name}
        rows = range(scored.start - first, scored.stop - first)
        yield from self._logits(hidden, rows, slabs, n_ctx - first, output_rows)
        if progress:
            progress(steps, steps)

    @staticmethod
    def _first_states(
        starts: Sequence[torch.Tensor], n_ctx: int, group: _Group, taken: Mapping[int, Sequence[str]]
    ) -> dict[State, torch.Tensor]:
        """Embeddings [B * T, width] by slab as each arm has them; taken: names of the arms, by slab."""
        hidden: dict[State, torch.Tensor] = {}
        for slab, start in zip(group.slabs, starts, strict=True):
            by_window = start.unflatten(0, (len(slab), n_ctx))
            of_span = {s: by_window[:, s.start : s.stop].flatten(0, 1) for s in set(group.spans.values())}
            hidden |= {(slab.start, name): of_span[group.spans[name]] for name in taken[slab.start]}
        return hidden

    def _attention(
        self,
        layer: int,
        slab: range,
        group: _Group,
        hidden: dict[State, torch.Tensor],
        weights: Weights,
    ) -> None:
        """The attention branch of a slab in every arm that runs it: `hidden` has the states after it."""
        shared = _Shared(x for (start, _), x in hidden.items() if start == slab.start)
        settings = self.architecture.attention_settings(layer)
        wanted = self.architecture.wanted_later(layer)
        before: AttentionInputs | None = None
        for arm in group.arms:
            x = hidden.get((slab.start, arm.name))
            if x is None:
                continue
            at = len(slab), group.spans[arm.name]
            with self.stopwatch.time("elementwise"):
                inputs, rounded = shared.inputs(
                    x,
                    partial(
                        self._inputs,
                        layer,
                        x,
                        at,
                        group.positions[at],
                        weights,
                        group.products,
                        before,
                        group.kept.get((self.architecture.kv_source(layer), slab.start, arm.name)),
                    ),
                )
            if layer in wanted:
                group.kept[layer, slab.start, arm.name] = inputs
            if arm is group.prompt:
                before = inputs
            q, k, v = rounded
            call = LayerCall(
                layer=layer,
                window=group.first_window + slab.start,
                q=q,
                k=k,
                v=v,
                kv_len=group.kv_lens[at],
                settings=settings,
                unrounded=inputs,
                x=x.unflatten(0, (len(slab), len(at[1]))),
            )
            with self.stopwatch.time(f"attention {arm.name}"):
                o = arm.attend(call)
            if o is None:
                for state in [state for state in hidden if state[1] == arm.name]:
                    del hidden[state]
                continue
            with self.stopwatch.time("elementwise"):
                hidden[slab.start, arm.name] = shared.after(
                    x, o, partial(self._after, layer, x, o, weights, group.products)
                )

    def _without_attention(
        self,
        layer: int,
        slab: range,
        group: _Group,
        hidden: dict[State, torch.Tensor],
        weights: Weights,
    ) -> None:
        """The branch that stands for attention, of a slab in every arm that runs it."""
        before: Any = None
        # By the state that an arm has; the state is held beside, so that its identity stays its own.
        done: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for arm in group.arms:
            x = hidden.get((slab.start, arm.name))
            if x is None:
                continue
            if id(x) not in done:
                with self.stopwatch.time("elementwise"):
                    windows = x.unflatten(0, (len(slab), len(group.spans[arm.name])))
                    after, state = self.architecture.without_attention(
                        layer, windows, before, weights, group.products
                    )
                done[id(x)] = x, after
                if arm is group.prompt:
                    before = state
            hidden[slab.start, arm.name] = done[id(x)][1]

    def _inputs(
        self,
        layer: int,
        x: torch.Tensor,
        at: tuple[int, range],
        positions: torch.Tensor,
        weights: Weights,
        products: Products,
        before: AttentionInputs | None,
        earlier: AttentionInputs | None,
    ) -> tuple[AttentionInputs, AttentionInputs]:
        """q, k and v [B, T, H, D] of B windows, behind those of a prompt, before and after they are rounded.

        at: B, and the span of a window; earlier: inputs of the layer whose keys and values this one reads.
        """
        if earlier is not None:
            q = self.architecture.attention_queries(layer, x, positions, weights, products)
            inputs = earlier._replace(q=q.unflatten(0, (at[0], len(at[1]))))
            return inputs, round_inputs(inputs, self.attention_type, self.architecture.kv_source(layer))
        flat = self.architecture.attention_inputs(layer, x, positions, weights, products)
        inputs = AttentionInputs(*(t.unflatten(0, (at[0], len(at[1]))) for t in flat))
        if before is not None:
            inputs = after(before, inputs)
        return inputs, round_inputs(inputs, self.attention_type, layer)

    def _after(
        self, layer: int, x: torch.Tensor, o: torch.Tensor, weights: Weights, products: Products
    ) -> torch.Tensor:
        return self.architecture.after_attention(layer, x, o.flatten(0, 1).to(x.dtype), weights, products)

    def _feed_forward(
        self,
        layer: int,
        hidden: dict[State, torch.Tensor],
        weights: Weights,
        products: Products,
        own: Callable[[State], torch.Tensor] | None,
    ) -> dict[State, torch.Tensor]:
        """The states that the next layer takes; states that are one tensor stay one."""
        first: dict[int, State] = {}
        like = {state: first.setdefault(id(x), state) for state, x in hidden.items()}
        distinct = {state: hidden[state] for state in first.values()}
        # Each is dropped as soon as the next layer's is there.
        hidden.clear()
        self.architecture.feed_forward(layer, distinct, weights, products, self.stream, own)
        return {state: distinct[same] for state, same in like.items()}

    def _positions(
        self, slabs: Sequence[range], spans: Sequence[range]
    ) -> tuple[dict[tuple[int, range], torch.Tensor], dict[tuple[int, range], torch.Tensor]]:
        """Positions [B * T] and visible keys [B, T] of slabs of B windows, by B and span of a window."""
        positions, kv_lens = {}, {}
        for span in spans:
            one = torch.arange(span.start, span.stop, device=self.device)
            for count in sorted({len(slab) for slab in slabs}):
                positions[count, span] = one.repeat(count)
                kv_lens[count, span] = keep_lengths((one + 1).to(torch.int32).expand(count, -1).contiguous())
        return positions, kv_lens

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

    def _embed(self, tokens: torch.Tensor, slabs: Sequence[range]) -> _FirstRows:
        """Rows of the embedding matrix of tokens [W, T], and what layers take of a token beside them."""
        architecture, n_ctx = self.architecture, tokens.shape[1]
        found, place = tokens.flatten().long().unique(return_inverse=True)
        rows = _SlabRows(self.stream, found, architecture.sizes.vocabulary)
        states = rows.of_tokens(architecture.embedding_tensor) * architecture.embedding_scale
        places = {slab.start: place[slab.start * n_ctx : slab.stop * n_ctx] for slab in slabs}
        # On tiles of one size: a row's bits depend on nothing but its token.
        own = architecture.own_inputs(states, rows, self.products.with_tile(OWN_TILE))
        return _FirstRows([states[places[slab.start]] for slab in slabs], own, places, n_ctx)


class _SlabRows:
    """`TokenRows` of tokens, each once, decoding a slice of a tensor at a time."""

    def __init__(self, stream: TensorStream, tokens: torch.Tensor, vocabulary: int) -> None:
        self.stream, self.tokens, self.vocabulary = stream, tokens, vocabulary

    def of_tokens(self, name: str) -> torch.Tensor:
        parts = []
        for first in range(0, self.vocabulary, VOCABULARY_ROWS):
            mine = self.tokens[(self.tokens >= first) & (self.tokens < first + VOCABULARY_ROWS)]
            # Processes that share their reading may need different rows: then all are read.
            if len(mine) or self.stream.share is not None:
                part = self.stream.take(name, slice(first, first + VOCABULARY_ROWS))
                parts.append(part[mine - first])
        return torch.cat(parts)

    def weights(self, name: str) -> torch.Tensor:
        return self.stream.take(name)


class _FirstRows(NamedTuple):
    """What a group's tokens bring.

    states: embeddings [B * T, width] by slab; own: `Architecture.own_inputs` of the tokens, each once;
    places: by slab, which of them each position has [B * T]; n_ctx: positions of a window.
    """

    states: list[torch.Tensor]
    own: torch.Tensor | None
    places: dict[int, torch.Tensor]
    n_ctx: int

    def own_of(self, layer: int, spans: Mapping[str, range], state: State) -> torch.Tensor:
        """Rows [B * T, P] of a state for a layer; spans: what each arm computes of a window."""
        assert self.own is not None
        span = spans[state[1]]
        place = self.places[state[0]].unflatten(0, (-1, self.n_ctx))[:, span.start : span.stop]
        return self.own[place.flatten(), layer]


class _Shared:
    """What arms of one slab and layer have in common whose hidden state is one tensor: computed once.

    states: those of all arms, once each. What is kept for a state is dropped with the last arm that has it.
    """

    def __init__(self, states: Iterable[torch.Tensor]) -> None:
        self._left = Counter(map(id, states))
        self._inputs: dict[int, tuple[AttentionInputs, AttentionInputs]] = {}
        self._outputs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def inputs(
        self, x: torch.Tensor, compute: Callable[[], tuple[AttentionInputs, AttentionInputs]]
    ) -> tuple[AttentionInputs, AttentionInputs]:
        """Of the next arm that has the state x."""
        found = self._inputs.pop(id(x), None) or compute()
        self._left[id(x)] -= 1
        if self._left[id(x)]:
            self._inputs[id(x)] = found
        return found

    def after(self, x: torch.Tensor, o: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The state after x and the attention output o: that of an earlier arm whose output had its bits."""
        for other, state in self._outputs.get(id(x), ()):
            if same_bits(o, other):
                return state
        state = compute()
        if self._left[id(x)]:
            self._outputs.setdefault(id(x), []).append((o, state))
        else:
            self._outputs.pop(id(x), None)
        return state


def _slabs(first_window: int, windows: int, at_once: int) -> list[range]:
    """Windows of a group that are computed together, numbered in the group: cut where the run's numbers are
    multiples of `at_once`, so that no group has others side by side."""
    cuts = range(at_once - first_window % at_once, windows, at_once)
    return [range(a, b) for a, b in pairwise((0, *cuts, windows)) if b > a]


def after(before: AttentionInputs, inputs: AttentionInputs) -> AttentionInputs:
    """Inputs whose keys and values come after those of a prompt: q [B, T, H, Dk], k and v [B, S, Hkv, D]."""
    k, v = (torch.cat((a, b), 1) for a, b in ((before.k, inputs.k), (before.v, inputs.v)))
    return AttentionInputs(inputs.q, k, v)


def round_inputs(inputs: AttentionInputs, to: RunCache, layer: int) -> AttentionInputs:
    """The one rounding of q, k and v to the run's attention type and cache, the same for every arm.

    layer: the one that the keys and values are of.
    """
    kind, cache = FLOAT_TYPES[to.attention].dtype, to.cache.at(layer)
    q, k, v = (x.to(kind) for x in inputs)
    if cache.as_given:
        return AttentionInputs(q, k, v)
    blocks = cache.blocks(k.shape[-1], v.shape[-1])
    k, v = kept(k, cache.k, blocks.k, cache.scale), kept(v, cache.v, blocks.v, cache.scale)
    return AttentionInputs(q, k, v)
