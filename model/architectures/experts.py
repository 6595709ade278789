"""Mixture of experts: a router gives each row a few experts; each expert is a gated feed-forward.

    scores s = sigmoid or softmax of the router's logits, or the logits themselves
    chosen   = the `used` experts with the greatest s + bias, within the groups that were chosen before
    weights  = s (without the bias) of the chosen, divided by their sum if `normalised`, times `scale`;
               where s are the logits, their softmax over the chosen
    out      = shared expert + sum over the chosen of weight * expert

Of groups those are chosen whose two greatest s + bias have the greatest sum.

Experts are decoded one at a time and applied to the rows that chose them, on row tiles of one size. A CPU
takes each state by itself, so that how many there are changes no bit. A GPU needs more rows than one state
has: there a tile holds rows of several, side by side, which rests on `verify.model.products.moves_no_bit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from verify.model.architectures.feed_forward import Key, Pull, Shapes
from verify.model.blocks import Gate, swiglu
from verify.model.products import Products

Gating = Literal["softmax", "sigmoid", "softmax of the chosen"]
# Values of `expert_gating_func`.
GATING: dict[int, Gating] = {1: "softmax", 2: "sigmoid", 3: "softmax of the chosen"}
# What a sum of weights is at least, before they are divided by it: the least normal number in float16.
LEAST_SUM = 2.0**-14


class ExpertRows(NamedTuple):
    """Rows of a tile at most; of the states that lie in one tensor, and of what an expert takes at once, at
    least (0: each state by itself)."""

    tile: int
    pack: int
    batch: int


# A window of 512 with 8 experts of 128 gives an expert 32 rows in the mean; a group of windows, in all arms
# that a GPU computes side by side, thousands.
ON_CPU, ON_GPU = ExpertRows(64, 0, 0), ExpertRows(1024, 16384, 16384)


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    used: int,
    gating: Gating,
    normalised: bool,
    scale: float,
    groups: int = 1,
    groups_used: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, X] to the chosen experts [T, used] and their weights [T, used].

    Of experts, and of groups, with equal scores the first are taken.
    """
    scores = logits
    if gating != "softmax of the chosen":
        scores = logits.sigmoid() if gating == "sigmoid" else logits.softmax(-1)
    ranked = scores if bias is None else scores + bias
    if groups_used < groups:
        of_group = ranked.unflatten(-1, (groups, -1))
        worth = torch.sort(of_group, dim=-1, descending=True).values[..., :2].sum(-1)
        left_out = torch.sort(worth, dim=-1, descending=True, stable=True).indices[:, groups_used:]
        ranked = of_group.scatter(1, left_out[..., None].expand(-1, -1, of_group.shape[-1]), -torch.inf)
        ranked = ranked.flatten(1)
    chosen = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :used]
    weights = scores.gather(-1, chosen)
    if gating == "softmax of the chosen":
        weights = weights.softmax(-1)
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(LEAST_SUM)
    return chosen, weights * scale


class _State(NamedTuple):
    """One state: its normed rows h [T, E], chosen experts and shares [T, used], and the sum so far [T, E]."""

    key: Any
    h: torch.Tensor
    chosen: torch.Tensor
    shares: torch.Tensor
    total: torch.Tensor


class _Pack(NamedTuple):
    """States that lie in one tensor, one behind the other."""

    keys: list[Any]  # which states
    lengths: list[int]  # rows of each
    h: torch.Tensor  # normed rows, [rows, E]
    total: torch.Tensor  # what experts add up to, [rows, E]
    rows: Sequence[torch.Tensor]  # by expert: the rows that chose it
    shares: Sequence[torch.Tensor]  # by expert: its shares in them


def _batches(packs: Sequence[_Pack], expert: int, rows: int) -> Iterator[list[_Pack]]:
    """The packs with rows for an expert, in batches of at least so many of these rows."""
    batch: list[_Pack] = []
    for pack in packs:
        if len(pack.rows[expert]):
            batch.append(pack)
        if batch and sum(len(p.rows[expert]) for p in batch) >= rows:
            yield batch
            batch = []
    if batch:
        yield batch


def _add_rows(total: torch.Tensor, rows: torch.Tensor, addend: torch.Tensor) -> None:
    """total[rows] += addend, where no row is named twice.

    So there is no order of additions to promise, for which torch would sort the rows.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        total.index_add_(0, rows, addend)
    finally:
        torch.set_deterministic_debug_mode(mode)


@dataclass(frozen=True)
class Experts:
    """Experts of a layer, of which each row takes some, and perhaps a shared one."""

    # Numbers of a hidden state; experts; those that a row takes; their inner dimension, the shared one's.
    width: int
    count: int  # experts
    used: int  # of them, by a row
    size: int  # inner dimension of one
    shared: int  # inner dimension of the shared one; 0: none
    gating: Gating  # how the router's logits become shares
    normalised: bool  # shares of a row are made to sum to 1
    scale: float  # of the shares
    # A bias that only chooses.
    has_bias: bool
    # Gate and up are one tensor `ffn_gate_up_exps`, the gate first.
    fused: bool = False
    # Groups of experts, and how many of them a row takes.
    groups: int = 1
    groups_used: int = 1  # by a row
    gate: Gate = swiglu  # of the experts
    shared_gate: Gate = swiglu  # of the shared one
    # The router, and each matrix of each expert, have a bias.
    biases: bool = False
    # The shared expert is multiplied by the sigmoid of a product of its own.
    shared_is_gated: bool = False
    # A state's key and its normed rows to the router's logits, where they do not come from these rows.
    router: Callable[[Any, torch.Tensor], torch.Tensor] | None = None

    @property
    def shapes(self) -> Shapes:
        found: Shapes = {"ffn_gate_inp": (self.count, self.width)}
        if self.has_bias:
            found["exp_probs_b.bias"] = (self.count,)
        if self.biases:
            found["ffn_gate_inp.bias"] = (self.count,)
            found |= {f"{name}.bias": shape[:2] for name, shape in self.streamed.items()}
        if self.shared_is_gated:
            found["ffn_gate_inp_shexp"] = (1, self.width)
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
        at_once = ON_GPU if weights["ffn_gate_inp"].is_cuda else ON_CPU
        tiles = products.with_tile(min(products.tile, at_once.tile))
        packs = list(self._packs(inputs, weights, products, pull, at_once.pack))
        wanted = [expert for expert in range(self.count) if any(len(pack.rows[expert]) for pack in packs)]
        for expert in pull.announce(self.streamed, wanted):
            part = {name: pull(name, expert) for name in self.streamed}
            part |= {f"{n}.bias": weights[f"{n}.bias"][expert] for n in self.streamed if self.biases}
            for batch in _batches(packs, expert, at_once.batch):
                self._add_expert(expert, batch, part, tiles, pull)
        for pack in packs:
            yield from zip(pack.keys, pack.total.split(pack.lengths), strict=True)

    def _packs(
        self,
        inputs: Iterable[tuple[Key, torch.Tensor]],
        weights: Mapping[str, torch.Tensor],
        products: Products,
        pull: Pull,
        rows: int,
    ) -> Iterator[_Pack]:
        """The states in packs of at least so many rows each, their rows sent to the experts."""
        states: list[_State] = []
        for key, h in inputs:
            chosen, shares = route(
                self.router_logits(key, h, weights, products),
                weights.get("exp_probs_b.bias"),
                used=self.used,
                gating=self.gating,
                normalised=self.normalised,
                scale=self.scale,
                groups=self.groups,
                groups_used=self.groups_used,
            )
            states.append(_State(key, h, chosen, shares, self._shared_expert(h, weights, products, pull)))
            if sum(len(state.h) for state in states) >= rows:
                yield self._pack(states)
                states = []
        if states:
            yield self._pack(states)

    def router_logits(
        self, key: Any, h: torch.Tensor, weights: Mapping[str, torch.Tensor], products: Products
    ) -> torch.Tensor:
        """[T, count] of a state's normed rows h [T, E]."""
        if self.router is not None:
            return self.router(key, h)
        return products(h, weights["ffn_gate_inp"], weights.get("ffn_gate_inp.bias"))

    def _pack(self, states: list[_State]) -> _Pack:
        keys, *each = zip(*states, strict=True)
        h, chosen, shares, total = (x[0] if len(x) == 1 else torch.cat(x) for x in each)
        entries = chosen.flatten()
        # Of each expert the entries that name it, in their order.
        order = torch.sort(entries, stable=True).indices
        counts = torch.bincount(entries.cpu(), minlength=self.count).tolist()
        rows, of_entries = order // self.used, shares.flatten()[order]
        lengths = [len(state.h) for state in states]
        return _Pack(
            keys=list(keys),
            lengths=lengths,
            h=h,
            total=total,
            rows=rows.split(counts),
            shares=of_entries.split(counts),
        )

    def _add_expert(
        self,
        expert: int,
        packs: Sequence[_Pack],
        part: Mapping[str, torch.Tensor],
        tiles: Products,
        pull: Pull,
    ) -> None:
        """Add what the expert makes of the rows that chose it, in whole tiles, to their totals."""
        rows = [pack.rows[expert] for pack in packs]
        counts = [len(r) for r in rows]
        x = packs[0].h.new_zeros((-(-sum(counts) // tiles.tile) * tiles.tile, self.width))
        for pack, mine, place in zip(packs, rows, x[: sum(counts)].split(counts), strict=True):
            torch.index_select(pack.h, 0, mine, out=place)
        out = self._expert(x, part, tiles, pull)[: sum(counts)]
        out *= torch.cat([pack.shares[expert] for pack in packs])[:, None]
        for pack, mine, addend in zip(packs, rows, out.split(counts), strict=True):
            _add_rows(pack.total, mine, addend)

    def _shared_expert(
        self, h: torch.Tensor, weights: Mapping[str, torch.Tensor], products: Products, pull: Pull
    ) -> torch.Tensor:
        if not self.shared:
            return torch.zeros_like(h)
        gated = self.shared_gate(products(h, weights["ffn_gate_shexp"]), products(h, weights["ffn_up_shexp"]))
        found = products.summed(gated, weights["ffn_down_shexp"], unit=pull.unit("ffn_down_shexp"))
        if self.shared_is_gated:
            found = found * products(h, weights["ffn_gate_inp_shexp"]).sigmoid()
        return found

    def _expert(
        self, h: torch.Tensor, part: Mapping[str, torch.Tensor], tiles: Products, pull: Pull
    ) -> torch.Tensor:
        def product(name: str) -> torch.Tensor:
            return tiles(h, part[name], part.get(f"{name}.bias"))

        if self.fused:
            gate, up = product("ffn_gate_up_exps").chunk(2, -1)
        else:
            gate, up = product("ffn_gate_exps"), product("ffn_up_exps")
        return tiles.summed(
            self.gate(gate, up),
            part["ffn_down_exps"],
            part.get("ffn_down_exps.bias"),
            unit=pull.unit("ffn_down_exps"),
        )
