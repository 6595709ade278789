"""Mixture of experts: a router gives each row a few experts; each expert is a gated feed-forward.

    scores s = sigmoid or softmax of the router's logits
    chosen   = the `used` experts with the greatest s + bias
    weights  = s (without the bias) of the chosen, divided by their sum if `normalised`, times `scale`
    out      = shared expert + sum over the chosen of weight * expert

Experts are decoded one at a time and applied to the rows that chose them, each state by itself and on row
tiles of one size, so that how many states there are changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from model.architectures.feed_forward import Key, Pull, Shapes
from model.blocks import swiglu
from model.products import Products

Gating = Literal["softmax", "sigmoid"]
# Values of `expert_gating_func`.
GATING: dict[int, Gating] = {1: "softmax", 2: "sigmoid"}
# Rows a tile: a window of 512 with 8 experts of 128 gives an expert 32 rows in the mean. A GPU is given many
# windows at once, and needs more rows.
EXPERT_ROWS, GPU_EXPERT_ROWS = 64, 256


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    used: int,
    gating: Gating,
    normalised: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, X] to the chosen experts [T, used] and their weights [T, used].

    Of experts with equal scores the first are taken.
    """
    scores = logits.sigmoid() if gating == "sigmoid" else logits.softmax(-1)
    ranked = scores if bias is None else scores + bias
    chosen = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :used]
    weights = scores.gather(-1, chosen)
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights * scale


@dataclass(frozen=True)
class Experts:
    """`used` of `count` experts of inner dimension `size`, and a shared one of `shared` (0: none).

    fused: gate and up are one tensor `ffn_gate_up_exps`, the gate first.
    """

    width: int
    count: int
    used: int
    size: int
    shared: int
    gating: Gating
    normalised: bool
    scale: float
    has_bias: bool
    fused: bool = False

    @property
    def shapes(self) -> Shapes:
        found: Shapes = {"ffn_gate_inp": (self.count, self.width)}
        if self.has_bias:
            found["exp_probs_b.bias"] = (self.count,)
        if self.shared:
            found["ffn_gate_shexp"] = found["ffn_up_shexp"] = (self.shared, self.width)
            found["ffn_down_shexp"] = (self.width, self.shared)
        return found

    @property
    def streamed(self) -> Shapes:
        down = {"ffn_down_exps": (self.count, self.width, self.size)}
        if self.fused:
            return {"ffn_gate_up_exps": (self.count, 2 * self.size, self.width), **down}
        inner = (self.count, self.size, self.width)
        return {"ffn_gate_exps": inner, "ffn_up_exps": inner, **down}

    def __call__(
        self,
        inputs: Iterable[tuple[Key, torch.Tensor]],
        weights: Mapping[str, torch.Tensor],
        products: Products,
        pull: Pull,
    ) -> Iterator[tuple[Key, torch.Tensor]]:
        states = list(inputs)
        routes = []
        sums = []
        for _, h in states:
            logits = products(h, weights["ffn_gate_inp"])
            routes.append(
                route(
                    logits,
                    weights.get("exp_probs_b.bias"),
                    used=self.used,
                    gating=self.gating,
                    normalised=self.normalised,
                    scale=self.scale,
                )
            )
            sums.append(self._shared_expert(h, weights, products, pull))
        tiles = products.with_tile(GPU_EXPERT_ROWS if weights["ffn_gate_inp"].is_cuda else EXPERT_ROWS)
        places = [self._places(chosen) for chosen, _ in routes]
        wanted = [expert for expert in range(self.count) if any(len(place[expert]) for place in places)]
        for expert in pull.announce(self.streamed, wanted):
            part = {name: pull(name, expert) for name in self.streamed}
            for (_, h), (_, shares), place, total in zip(states, routes, places, sums, strict=True):
                if len(place[expert]):
                    rows, slots = place[expert] // self.used, place[expert] % self.used
                    out = self._expert(h[rows], part, tiles, pull)
                    total[rows] += out * shares[rows, slots][:, None]
        for (key, _), total in zip(states, sums, strict=True):
            yield key, total

    def _places(self, chosen: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of each expert the entries of chosen [T, used], flattened, that name it, in their order."""
        flat = chosen.flatten()
        order = torch.sort(flat, stable=True).indices
        return order.split(torch.bincount(flat.cpu(), minlength=self.count).tolist())

    def _shared_expert(
        self, h: torch.Tensor, weights: Mapping[str, torch.Tensor], products: Products, pull: Pull
    ) -> torch.Tensor:
        if not self.shared:
            return torch.zeros_like(h)
        gated = swiglu(products(h, weights["ffn_gate_shexp"]), products(h, weights["ffn_up_shexp"]))
        return products.summed(gated, weights["ffn_down_shexp"], unit=pull.unit("ffn_down_shexp"))

    def _expert(
        self, h: torch.Tensor, part: Mapping[str, torch.Tensor], tiles: Products, pull: Pull
    ) -> torch.Tensor:
        if self.fused:
            gate, up = tiles(h, part["ffn_gate_up_exps"]).chunk(2, -1)
        else:
            gate, up = tiles(h, part["ffn_gate_exps"]), tiles(h, part["ffn_up_exps"])
        return tiles.summed(swiglu(gate, up), part["ffn_down_exps"], unit=pull.unit("ffn_down_exps"))
