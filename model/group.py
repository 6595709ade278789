"""A group of windows on its way through the layers: the steps of a layer, for every arm and slab.

Everything but attention is float32 (or float64, if asked) on fixed row tiles; attention is each arm's own.
What arms have in common is computed once (`sharing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from verify.kernels.cache_types import RunCache
from verify.kernels.lengths import keep_lengths
from verify.model.architectures.architecture import Architecture, AttentionInputs, Weights
from verify.model.layer_call import AttentionPass, LayerCall, after, round_inputs
from verify.model.logits import State
from verify.model.products import Products
from verify.model.sharing import Shared
from verify.model.stopwatch import Stopwatch
from verify.model.stream import TensorStream


@dataclass(kw_only=True)
class Group:
    """What does not change while a group runs, and its steps.

    Hidden states are by slab and arm, [B * T, width]; those of an arm that fails are dropped.
    """

    architecture: Architecture  # of the model
    stream: TensorStream  # that experts are taken from
    stopwatch: Stopwatch[str]  # of the run
    attention_type: RunCache  # what q, k and v are rounded to
    slabs: list[range]  # windows that are computed together
    arms: list[AttentionPass]  # of the run
    prompt: AttentionPass | None  # what is before the scored rows; None: nothing
    spans: dict[str, range]  # what each arm computes of a window
    first_window: int  # number in the run
    products: Products  # on the tiles of its slabs
    positions: dict[tuple[int, range], torch.Tensor]  # [B * T], by B, the windows of a slab, and span
    kv_lens: dict[tuple[int, range], torch.Tensor]  # [B, T], likewise
    # Inputs of layers whose keys and values later layers read, by layer, slab and arm.
    kept: dict[tuple[int, int, str], AttentionInputs] = field(default_factory=dict)

    def first_states(
        self, starts: Sequence[torch.Tensor], n_ctx: int, taken: Mapping[int, Sequence[str]]
    ) -> dict[State, torch.Tensor]:
        """Embeddings [B * T, width] by slab as each arm has them; taken: names of the arms, by slab."""
        hidden: dict[State, torch.Tensor] = {}
        for slab, start in zip(self.slabs, starts, strict=True):
            by_window = start.unflatten(0, (len(slab), n_ctx))
            of_span = {s: by_window[:, s.start : s.stop].flatten(0, 1) for s in set(self.spans.values())}
            hidden |= {(slab.start, name): of_span[self.spans[name]] for name in taken[slab.start]}
        return hidden

    def attention(
        self,
        layer: int,
        slab: range,
        hidden: dict[State, torch.Tensor],
        weights: Weights,
    ) -> None:
        """The attention branch of a slab in every arm that runs it: `hidden` has the states after it."""
        shared = Shared(x for (start, _), x in hidden.items() if start == slab.start)
        settings = self.architecture.attention_settings(layer)
        wanted = self.architecture.wanted_later(layer)
        before: AttentionInputs | None = None
        for arm in self.arms:
            x = hidden.get((slab.start, arm.name))
            if x is None:
                continue
            at = len(slab), self.spans[arm.name]
            with self.stopwatch.time("elementwise"):
                inputs, rounded = shared.inputs(
                    x,
                    partial(
                        self._inputs,
                        layer,
                        x,
                        at,
                        self.positions[at],
                        weights,
                        before,
                        self.kept.get((self.architecture.kv_source(layer), slab.start, arm.name)),
                    ),
                )
            if layer in wanted:
                self.kept[layer, slab.start, arm.name] = inputs
            if arm is self.prompt:
                before = inputs
            call = LayerCall(
                layer=layer,
                window=self.first_window + slab.start,
                q=rounded.q,
                k=rounded.k,
                v=rounded.v,
                kv_len=self.kv_lens[at],
                settings=settings,
                keys=rounded.keys,
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
                hidden[slab.start, arm.name] = shared.after(x, o, partial(self._after, layer, x, o, weights))

    def without_attention(
        self,
        layer: int,
        slab: range,
        hidden: dict[State, torch.Tensor],
        weights: Weights,
    ) -> None:
        """The branch that stands for attention, of a slab in every arm that runs it."""
        before: Any = None
        # By the state that an arm has; the state is held beside, so that its identity stays its own.
        done: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for arm in self.arms:
            x = hidden.get((slab.start, arm.name))
            if x is None:
                continue
            if id(x) not in done:
                with self.stopwatch.time("elementwise"):
                    windows = x.unflatten(0, (len(slab), len(self.spans[arm.name])))
                    after, state = self.architecture.without_attention(
                        layer, windows, before, weights, self.products
                    )
                done[id(x)] = x, after
                if arm is self.prompt:
                    before = state
            hidden[slab.start, arm.name] = done[id(x)][1]

    def feed_forward(
        self,
        layer: int,
        hidden: dict[State, torch.Tensor],
        weights: Weights,
        own: Callable[[State], torch.Tensor] | None,
    ) -> dict[State, torch.Tensor]:
        """The states that the next layer takes; states that are one tensor stay one."""
        first: dict[int, State] = {}
        like = {state: first.setdefault(id(x), state) for state, x in hidden.items()}
        distinct = {state: hidden[state] for state in first.values()}
        # Each is dropped as soon as the next layer's is there.
        hidden.clear()
        self.architecture.feed_forward(layer, distinct, weights, self.products, self.stream, own)
        return {state: distinct[same] for state, same in like.items()}

    def forget(self, layer: int) -> None:
        """Drop the inputs that no layer after this one reads."""
        wanted = self.architecture.wanted_later(layer)
        for kept in [key for key in self.kept if key[0] not in wanted]:
            del self.kept[kept]

    def _inputs(
        self,
        layer: int,
        x: torch.Tensor,
        at: tuple[int, range],
        positions: torch.Tensor,
        weights: Weights,
        before: AttentionInputs | None,
        earlier: AttentionInputs | None,
    ) -> tuple[AttentionInputs, AttentionInputs]:
        """q, k and v [B, T, H, D] of B windows, behind those of a prompt, before and after they are rounded.

        at: B, and the span of a window; earlier: inputs of the layer whose keys and values this one reads.
        """
        if earlier is not None:
            q = self.architecture.attention_queries(layer, x, positions, weights, self.products)
            inputs = earlier._replace(q=q.unflatten(0, (at[0], len(at[1]))))
            return inputs, round_inputs(inputs, self.attention_type, self.architecture.kv_source(layer))
        flat = self.architecture.attention_inputs(layer, x, positions, weights, self.products)
        inputs = flat.each(lambda t: t.unflatten(0, (at[0], len(at[1]))))
        if before is not None:
            inputs = after(before, inputs)
        keys = self.architecture.chosen_keys(layer, inputs.indexer, self.kv_lens[at])
        inputs = inputs._replace(keys=keys)
        return inputs, round_inputs(inputs, self.attention_type, layer)

    def _after(self, layer: int, x: torch.Tensor, o: torch.Tensor, weights: Weights) -> torch.Tensor:
        return self.architecture.after_attention(
            layer, x, o.flatten(0, 1).to(x.dtype), weights, self.products
        )


def slabs_of(first_window: int, windows: int, at_once: int) -> list[range]:
    """Windows of a group that are computed together, numbered in the group: cut where the run's numbers are
    multiples of `at_once`, so that no group has others side by side."""
    cuts = range(at_once - first_window % at_once, windows, at_once)
    return [range(a, b) for a, b in pairwise((0, *cuts, windows)) if b > a]


def positions_of(
    slabs: Sequence[range], spans: Sequence[range], device: torch.device
) -> tuple[dict[tuple[int, range], torch.Tensor], dict[tuple[int, range], torch.Tensor]]:
    """Positions [B * T] and visible keys [B, T] of slabs of B windows, by B and span of a window."""
    positions, kv_lens = {}, {}
    for span in spans:
        one = torch.arange(span.start, span.stop, device=device)
        for count in sorted({len(slab) for slab in slabs}):
            positions[count, span] = one.repeat(count)
            kv_lens[count, span] = keep_lengths((one + 1).to(torch.int32).expand(count, -1).contiguous())
    return positions, kv_lens
