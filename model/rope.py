"""Rotary position embeddings: NORM rotates neighbours (2i, 2i+1), NEOX rotates (i, i + n/2).

    angle of pair i at position t = t * f_i,      f_i = base^(-2i/n)

Linear scaling divides every f_i by its factor. YaRN divides the slow ones, leaves the fast ones, goes from
one to the other on a ramp between the pairs that turn beta_slow and beta_fast times within the original
context, and multiplies what is rotated by a magnitude.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

RopeKind = Literal["norm", "neox"]
BETA_FAST, BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class Rope:
    """Rotation of the first dimensions of a head."""

    kind: RopeKind  # which dimensions are pairs
    size: int  # dimensions that are rotated
    base: float = 10000.0  # of the frequencies
    factor: float = 1.0  # of linear scaling, or of YaRN where original_context is given
    original_context: int | None = None  # tokens, of YaRN
    magnitude: float = 1.0  # multiplies the rotated dimensions
    divisors: torch.Tensor | None = None  # of the frequencies, [size/2]: the `rope_freqs` tensor of a file
    beta_fast: float = BETA_FAST  # of YaRN
    beta_slow: float = BETA_SLOW  # of YaRN
    # The last positions and their tables: all windows, arms and layers of a group ask for the same.
    _last: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def frequencies(self) -> torch.Tensor:
        """f_i of each pair, [size/2] float64, in radians a position."""
        pairs = torch.arange(self.size // 2, dtype=torch.float64)
        plain = self.base ** (-2 * pairs / self.size)
        if self.divisors is not None:
            plain = plain / self.divisors.to("cpu", torch.float64)
        if self.original_context is None:
            return plain / self.factor
        low = max(math.floor(self._pair_that_turns(self.beta_fast)), 0)
        high = min(math.ceil(self._pair_that_turns(self.beta_slow)), self.size - 1)
        slow = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain * (1 - slow) + plain / self.factor * slow

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [T, H, D] at positions [T], the dimensions from `size` on left as they are."""
        half = self.size // 2
        cos, sin = self._tables(positions, x.dtype)
        rotated, rest = x[..., : self.size], x[..., self.size :]
        if self.kind == "norm":
            # Copied apart: every second number takes a CPU three times as long as all of them.
            a, b = rotated.unflatten(-1, (half, 2)).movedim(-1, 0).contiguous()
            pairs = a.new_empty((*a.shape, 2))
            torch.sub(a * cos, b * sin, out=pairs[..., 0])
            torch.add(a * sin, b * cos, out=pairs[..., 1])
            turned = pairs.flatten(-2)
        else:
            a, b = rotated[..., :half], rotated[..., half:]
            turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned

    def _tables(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of every angle times the magnitude, [T, 1, size/2]."""
        if not self._last or self._last[0][0] is not positions or self._last[0][1].dtype != dtype:
            angles = positions.to(torch.float64)[:, None] * self.frequencies().to(positions.device)
            cos, sin = ((f(angles) * self.magnitude).to(dtype)[:, None] for f in (torch.cos, torch.sin))
            self._last[:] = [(positions, cos, sin)]
        return self._last[0][1:]

    def _pair_that_turns(self, times: float) -> float:
        """The (fractional) pair that turns so many times within the original context."""
        assert self.original_context is not None
        turn = self.original_context / (times * 2 * math.pi)
        return self.size * math.log(turn) / (2 * math.log(self.base))
