"""Queries scaled by their position, so that attention over long contexts stays sharp: Llama 4, Mistral 3.

factor at position t = 1 + scale * ln(1 + floor(t / length))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verify.model.architectures.architecture import Architecture


@dataclass(frozen=True)
class Temperature:
    """length: positions before the factor leaves one."""

    scale: float
    length: int

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        """Factors [T] float64 of positions [T]."""
        return 1 + self.scale * torch.log1p((positions.double() / self.length).floor())


def temperature_of(architecture: Architecture, *, has_length: bool = True) -> Temperature | None:
    """What `attention.temperature_scale` and `attention.temperature_length` say; None for a scale of 0.

    has_length: else it is the context that the model was trained on before YaRN. Raises ModelError.
    """
    read = architecture.metadata
    scale = read.number("attention.temperature_scale", 0.0)
    length = read.whole("rope.scaling.original_context_length", read.whole("context_length"))
    if has_length and scale:
        length = read.whole("attention.temperature_length")
    return Temperature(scale, length) if scale else None
