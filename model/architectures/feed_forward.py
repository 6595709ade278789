"""The gated feed-forward of a layer: what every architecture has where it has no experts."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch

from verify.model.blocks import Gate, swiglu
from verify.model.products import Products

Key = TypeVar("Key", bound=Hashable)
Shapes = dict[str, tuple[int, ...]]


class Pull(Protocol):
    """Experts of a layer, one at a time."""

    def announce(self, names: Iterable[str], experts: Iterable[int]) -> Sequence[int]:
        """Say which experts' parts of which tensors will be pulled, in this order, and get them back.

        Where processes share their reading, these are the experts that any of them named: all are pulled.
        """
        ...

    def __call__(self, name: str, expert: int) -> torch.Tensor:
        """An expert's part of a tensor that has the experts in its first dimension, by its short name."""
        ...

    def unit(self, name: str) -> int:
        """Columns of a tensor, by its short name, that stay together where GPUs share them out."""
        ...


class FeedForward(Protocol):
    """A feed-forward between a norm and a residual.

    shapes: tensors that are held while a layer runs, short name -> shape; streamed: ones too large for that,
    which are pulled an expert at a time.
    """

    @property
    def shapes(self) -> Shapes: ...

    @property
    def streamed(self) -> Shapes: ...

    def __call__(
        self,
        inputs: Iterable[tuple[Key, torch.Tensor]],
        weights: Mapping[str, torch.Tensor],
        products: Products,
        pull: Pull,
    ) -> Iterator[tuple[Key, torch.Tensor]]:
        """Normed hidden states [T, E] by key to what is added to the residual, in the same order."""
        ...


class Dense:
    """down(gate_function(gate(x), up(x))).

    fused: gate and up are one tensor `ffn_up`, the gate first; biases: names of the matrices that have one.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        *,
        gate: Gate = swiglu,
        fused: bool = False,
        biases: Collection[str] = (),
    ) -> None:
        self.width, self.inner, self.gate, self.fused = width, inner, gate, fused
        self.biases = biases

    @property
    def shapes(self) -> Shapes:
        inner, down = (self.inner, self.width), (self.width, self.inner)
        found: Shapes = {"ffn_gate": inner, "ffn_up": inner, "ffn_down": down}
        if self.fused:
            found = {"ffn_up": (2 * self.inner, self.width), "ffn_down": down}
        return found | {f"{name}.bias": found[name][:1] for name in self.biases}

    @property
    def streamed(self) -> Shapes:
        return {}

    def __call__(
        self,
        inputs: Iterable[tuple[Key, torch.Tensor]],
        weights: Mapping[str, torch.Tensor],
        products: Products,
        pull: Pull,
    ) -> Iterator[tuple[Key, torch.Tensor]]:
        for key, h in inputs:
            up = products(h, weights["ffn_up"], weights.get("ffn_up.bias"))
            if self.fused:
                gate, up = up.chunk(2, -1)
            else:
                gate = products(h, weights["ffn_gate"], weights.get("ffn_gate.bias"))
            yield (
                key,
                products.summed(
                    self.gate(gate, up),
                    weights["ffn_down"],
                    weights.get("ffn_down.bias"),
                    unit=pull.unit("ffn_down"),
                ),
            )
