"""Matrix products with weights, on row tiles of one fixed shape.

A BLAS picks its kernel by the shape of the product, so the same row gives other bits in a batch of 7 than
in one of 512. Here every product has `tile` rows, the last tile padded with zeros: how many windows there are
changes no bit.

On a CPU tiles start where a window starts, and a row's bits depend on nothing but its place in its window. A
GPU needs more rows than a short window has, so there a tile holds several windows, side by side. Which ones
depends on the group; `moves_no_bit` is what that rests on, and the first product of each shape tries it.

Where several GPUs share a layer (tensor parallel), the matrices that end a branch are cut by columns: each
GPU multiplies its own, and the results are added up in the order of the GPUs (`summed`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from verify.kernels.tensor_parallel import shares
from verify.model.stopwatch import Stopwatch

MOST_ROWS = 512
# Numbers of a tile's input on a GPU: enough rows to fill it at any width.
_NUMBERS_A_TILE = 1 << 23
_FEWEST_GPU_ROWS, _MOST_GPU_ROWS = 2048, 16384


class Tiling(NamedTuple):
    """rows: of a tile of the products; windows: how many are computed side by side."""

    rows: int
    windows: int


def tile_rows(n_ctx: int) -> int:
    """Rows a tile on a CPU for windows of n_ctx tokens: n_ctx rounded up to 16, at most MOST_ROWS."""
    return min(-(-n_ctx // 16) * 16, MOST_ROWS)


def tiling_of(n_ctx: int, width: int, device: torch.device) -> Tiling:
    """By the shapes and the kind of device alone: neither groups nor free memory move a tile."""
    if device.type == "cpu":
        return Tiling(tile_rows(n_ctx), 1)
    rows = 1 << max(_NUMBERS_A_TILE // width - 1, 0).bit_length()
    rows = min(max(rows, _FEWEST_GPU_ROWS), _MOST_GPU_ROWS)
    return Tiling(rows, max(rows // n_ctx, 1))


def moves_no_bit(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a row has the same bits wherever it lies in a product of this shape."""
    by = x.shape[0] // 3 + 1
    there = torch.mm(x.roll(by, 0), weight.T).roll(-by, 0)
    return torch.equal(torch.mm(x, weight.T), there)


@dataclass
class Products:
    """x [rows, in] @ weight [out, in]^T, tile by tile, in the type of its operands (float32 or float64).

    gpus: how many share the columns of `summed`; checked: shapes whose products were tried on a GPU, and
    whether they move no bit.
    """

    tile: int
    stopwatch: Stopwatch[str]
    gpus: int = 1
    checked: dict[tuple[int, ...], bool] = field(default_factory=dict)

    def with_tile(self, rows: int) -> Products:
        """The same on tiles of other rows."""
        return replace(self, tile=rows)

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
        if x.is_cuda and rows:
            shape = (self.tile, *weight.shape, *weight.stride())
            if shape not in self.checked:
                self.checked[shape] = moves_no_bit(x[: self.tile], weight)
        with self.stopwatch.time("products"):
            for first in range(0, tiles * self.tile, self.tile):
                rows_of_tile = slice(first, first + self.tile)
                torch.mm(x[rows_of_tile], weight.T, out=out[rows_of_tile])
        self.stopwatch.flop += 2.0 * out.numel() * width
        out = out[:rows]
        return out if bias is None else out + bias

    def summed(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, unit: int
    ) -> torch.Tensor:
        """The product as several GPUs have it: each its columns of `weight`, in whole units, then their sum.

        ((x_0 w_0^T + x_1 w_1^T) + x_2 w_2^T) + ... + bias, every step in the type of the operands. With one
        GPU it is the product itself. unit: columns that no cut falls between.
        """
        if self.gpus == 1:
            return self(x, weight, bias)
        total = None
        for own in shares(weight.shape[1], self.gpus, unit):
            if len(own):
                part = self(x[:, own.start : own.stop].contiguous(), weight[:, own.start : own.stop])
                total = part if total is None else total.add_(part)
        assert total is not None
        return total if bias is None else total + bias
