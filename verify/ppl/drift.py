"""Drift: how far a pass lies from the exact arm after each layer, and at which positions.

||x - x_exact|| / ||x_exact|| of the residual stream that enters a layer, over ranges of positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from verify.model.layer_call import LayerCall
from verify.ppl.record import DriftArm, DriftLayer, DriftRecord

MOST_RANGES = 8
# Squares of the difference and of the exact arm's own: by pass and layer, [ranges] each.
Sums = dict[tuple[str, int], torch.Tensor]


def position_edges(n_ctx: int, first: int = 0) -> list[int]:
    """Bounds of up to MOST_RANGES equal ranges of the positions first .. n_ctx - 1."""
    ranges = min(MOST_RANGES, n_ctx - first)
    return [first + (n_ctx - first) * i // ranges for i in range(ranges + 1)]


class DriftSums:
    """Adds up squares as the passes call in; the exact arm must call first in each layer."""

    def __init__(self, edges: Sequence[int], device: torch.device) -> None:
        self.edges = list(edges)
        self.sums: Sums = {}
        first, positions = edges[0], torch.arange(edges[0], edges[-1], device=device)
        bounds = torch.tensor(edges, device=device)
        inside = (positions >= bounds[:-1, None]) & (positions < bounds[1:, None])
        self._inside = inside.double()  # [ranges, T]
        self._first = first
        self._exact: torch.Tensor | None = None
        # Sums of the exact arm's squares at the layer and windows at hand, once a pass has asked for them.
        self._own: torch.Tensor | None = None

    def add(self, name: str, call: LayerCall, *, exact: bool = False) -> None:
        """One layer of one pass. All passes enter the first layer alike: it is left out."""
        if call.x is None or call.layer == 0:
            return
        if exact:
            self._exact, self._own = call.x, None
            return
        assert self._exact is not None
        if self._own is None:
            self._own = _squares(self._exact)
        squares = torch.stack([_squares(call.x - self._exact), self._own])
        found = squares @ self._inside.T  # [2, ranges]
        key = name, call.layer
        self.sums[key] = self.sums[key] + found if key in self.sums else found

    def to_json(self) -> dict[str, Any]:
        """What `join_drift` takes."""
        return {
            "edges": self.edges,
            "sums": [[name, layer, x.tolist()] for (name, layer), x in self.sums.items()],
        }


def _squares(x: torch.Tensor) -> torch.Tensor:
    """[B, T, width] to sums of squares [T] in float64."""
    return x.double().square().sum((0, -1))


def join_drift(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The sums of several groups as one, each as `DriftSums.to_json` gave them."""
    total: dict[tuple[str, int], list[list[float]]] = {}
    for group in groups:
        for name, layer, sums in group["sums"]:
            old = total.get((name, layer))
            total[name, layer] = (
                sums
                if old is None
                else [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(old, sums, strict=True)]
            )
    return {
        "edges": groups[0]["edges"] if groups else [],
        "sums": [[name, layer, sums] for (name, layer), sums in total.items()],
    }


def drift_record(joined: dict[str, Any]) -> DriftRecord:
    """What joined sums amount to."""
    layers: dict[str, list[DriftLayer]] = {}
    for name, layer, (difference, own) in joined["sums"]:
        layers.setdefault(name, []).append(
            DriftLayer(
                layer=layer,
                relative=_root(sum(difference), sum(own)),
                by_position=[_root(d, x) for d, x in zip(difference, own, strict=True)],
            )
        )
    arms = [
        DriftArm(arm=name, layers=sorted(lines, key=lambda line: line.layer))
        for name, lines in layers.items()
    ]
    return DriftRecord(edges=joined["edges"], arms=arms)


def _root(difference: float, own: float) -> float:
    return math.sqrt(difference / own) if own > 0 else 0.0
