"""Matrix products with weights, on row tiles of one fixed shape.

A BLAS picks its kernel by the shape of the product, so the same row gives other bits in a batch of 7 than
in one of 512. Here every product has `tile` rows, the last tile padded with zeros, and tiles start where a
window starts: the bits of a row depend on nothing but its place in its window.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

MOST_ROWS = 512


def tile_rows(n_ctx: int) -> int:
    """Rows a tile for windows of n_ctx tokens: n_ctx rounded up to 16, at most MOST_ROWS."""
    return min(-(-n_ctx // 16) * 16, MOST_ROWS)


@dataclass
class Stopwatch:
    """Seconds by kind of work (`products`, `attention`, `weights`), and operations of the products."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    flop: float = 0.0

    @contextmanager
    def time(self, kind: str) -> Iterator[None]:
        started = self._now()
        try:
            yield
        finally:
            self.seconds[kind] = self.seconds.get(kind, 0.0) + self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass
class Products:
    """x [rows, in] @ weight [out, in]^T in float32, tile by tile."""

    tile: int
    stopwatch: Stopwatch

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`out`: a buffer for whole tiles, of which a view is returned."""
        rows, width = x.shape
        tiles = -(-rows // self.tile)
        if tiles * self.tile != rows:
            padded = x.new_zeros((tiles * self.tile, width))
            padded[:rows] = x
            x = padded
        if out is None:
            out = x.new_empty((tiles * self.tile, weight.shape[0]))
        with self.stopwatch.time("products"):
            for first in range(0, tiles * self.tile, self.tile):
                rows_of_tile = slice(first, first + self.tile)
                torch.mm(x[rows_of_tile], weight.T, out=out[rows_of_tile])
        self.stopwatch.flop += 2.0 * out.numel() * width
        out = out[:rows]
        return out if bias is None else out + bias
