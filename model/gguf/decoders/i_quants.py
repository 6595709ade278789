"""I-quants: blocks of 256 weights whose codes choose a row of a grid, or one of a few uneven values.

The grids of 8 (or 4) magnitudes are the `gguf` package's; a row is one word here, so one look-up gives all of
them. Groups of 32 weights, or of 16 where the scale says so. n blocks; d float16, one a block.
"""

from __future__ import annotations

from functools import cache

import torch

from verify.kernels.cache import IQ4_NL_VALUES
from verify.model.gguf.decoders.blocks import (
    Decoder,
    Scaled,
    even_sign_bytes,
    fields,
    halves,
    ints,
    look_up,
    packed,
    pairs,
    planes,
    shorts,
    sign_bytes,
    signed,
    spread,
    valued,
)


def iq2_xxs(blocks: torch.Tensor) -> Scaled:
    """d * (s + 1/2) / 4 * grid a group: for each, 4 row numbers of 8 bits and a word: 4 times 7 signs, s."""
    words = ints(blocks[:, 2:]).view(-1, 8, 2)
    rows = words.view(torch.uint8).view(-1, 8, 8)[:, :, :4]
    signs, scale = _signs_and_scale(words[:, :, 1])
    grid = look_up(_grid("IQ2_XXS", blocks.device), rows)
    return Scaled(signed(grid, signs), (halves(blocks[:, :2]) * (scale + 0.5) * 0.25)[:, :, None])


def iq2_xs(blocks: torch.Tensor) -> Scaled:
    """d * (s + 1/2) / 4 * grid a group of 16: 32 times 9 bits of a row and 7 signs, 16 s of 4 bits."""
    words = shorts(blocks[:, 2:66])
    grid = look_up(_grid("IQ2_XS", blocks.device), words & 511)
    codes = signed(grid, look_up(even_sign_bytes(blocks.device), words >> 9))
    return Scaled(codes.view(-1, 16, 16), _quarters(blocks[:, :2], pairs(blocks[:, 66:], 0, 4, mask=15)))


def iq2_s(blocks: torch.Tensor) -> Scaled:
    """d * (s + 1/2) / 4 * grid a group of 16: low 8 bits of 32 rows, 256 signs, high 2 bits, 16 s."""
    rows = blocks[:, 2:34].to(torch.int32) | pairs(blocks[:, 66:74], 0, 2, 4, 6, mask=3).to(torch.int32) << 8
    grid = look_up(_grid("IQ2_S", blocks.device), rows)
    codes = signed(grid, look_up(sign_bytes(blocks.device), blocks[:, 34:66]))
    return Scaled(codes.view(-1, 16, 16), _quarters(blocks[:, :2], pairs(blocks[:, 74:], 0, 4, mask=15)))


def iq3_xxs(blocks: torch.Tensor) -> Scaled:
    """d * (s + 1/2) / 2 * grid a group: 64 rows of 4 weights, 8 words: 4 times 7 signs, s."""
    signs, scale = _signs_and_scale(ints(blocks[:, 66:]))
    grid = look_up(_grid("IQ3_XXS", blocks.device), blocks[:, 2:66]).view(torch.int64).view(-1, 8, 4)
    return Scaled(signed(grid, signs), (halves(blocks[:, :2]) * (scale + 0.5) * 0.5)[:, :, None])


def iq3_s(blocks: torch.Tensor) -> Scaled:
    """d * (2 s + 1) * grid a group: low 8 bits of 64 rows of 4 weights, their ninth, 256 signs, 8 s."""
    rows = blocks[:, 2:66].to(torch.int32) | spread(blocks[:, 66:74]).to(torch.int32) << 8
    grid = look_up(_grid("IQ3_S", blocks.device), rows).view(torch.int64)
    codes = signed(grid, look_up(sign_bytes(blocks.device), blocks[:, 74:106]))
    odd = pairs(blocks[:, 106:], 0, 4, mask=15) * 2 + 1
    return Scaled(codes.view(-1, 8, 32), (halves(blocks[:, :2]) * odd)[:, :, None])


def iq1_s(blocks: torch.Tensor) -> Scaled:
    """d * (2 s + 1) * (grid +- 1/8) a group: low 8 bits of 32 rows, 8 words: 4 times 3 more, s, a sign."""
    words = shorts(blocks[:, 34:])
    high = fields(words, 0, 3, 6, 9, mask=7) | (words >> 15 << 3)[:, :, None]
    rows = blocks[:, 2:34].to(torch.int32) | high.view(-1, 32) << 8
    odd = 2 * (words >> 12 & 7) + 1
    codes = look_up(_shifted_grid(blocks.device), rows).view(torch.int8)
    return Scaled(codes.view(-1, 8, 32), (halves(blocks[:, :2]) * odd * 0.125)[:, :, None])


def iq1_m(blocks: torch.Tensor) -> Scaled:
    """d * (2 s + 1) * (grid +- 1/8) a group of 16: low 8 bits of 32 rows, 4 bits for each: 3 high, a sign; 4
    words: 4 times s of 3 bits and, above them, 4 bits of d."""
    rows = blocks[:, :32].to(torch.int32) | pairs(blocks[:, 32:48], 0, 4, mask=15).to(torch.int32) << 8
    words = shorts(blocks[:, 48:])
    of_d = (words >> 12) << torch.arange(0, 16, 4, dtype=torch.int32, device=blocks.device)
    d = of_d.sum(1, keepdim=True).to(torch.int16).view(torch.float16).to(torch.float32)
    odd = 2 * fields(words, 0, 3, 6, 9, mask=7).view(-1, 16) + 1
    codes = look_up(_shifted_grid(blocks.device), rows).view(torch.int8)
    return Scaled(codes.view(-1, 16, 16), (d * odd * 0.125)[:, :, None])


def iq4_nl(blocks: torch.Tensor) -> Scaled:
    """d * values[q]: d, 32 q of 4 bits, a block of 32 in the order of Q4_0."""
    codes = valued(planes(blocks[:, 2:], 0, 4, mask=15), IQ4_NL_VALUES)
    return Scaled(codes.permute(1, 0, 2), halves(blocks[:, :2])[:, None])


def iq4_xs(blocks: torch.Tensor) -> Scaled:
    """d * (s - 32) * values[q] a group: d, the high 2 bits of 8 s, their low 4, 256 q, a group as in Q4_0."""
    codes = valued(planes(blocks[:, 8:], 0, 4, mask=15), IQ4_NL_VALUES).view(2, -1, 8, 16)
    high = pairs(blocks[:, 2:4], 0, 2, 4, 6, mask=3) << 4
    scale = (pairs(blocks[:, 4:8], 0, 4, mask=15) | high).sub_(32).view(torch.int8)
    return Scaled(codes.permute(1, 2, 0, 3), (halves(blocks[:, :2]) * scale)[:, :, None, None])


def _signs_and_scale(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sign bytes [n, 8, 4] int64 and s [n, 8] float32 of words [n, 8]: 4 times 7 signs, 4 bits of s."""
    signs = look_up(even_sign_bytes(words.device), fields(words, 0, 7, 14, 21, mask=127))
    return signs, (words >> 28 & 15).to(torch.float32)


def _quarters(d: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return (halves(d) * (s.to(torch.float32) + 0.5) * 0.25)[:, :, None]


@cache
def _grid(name: str, device: torch.device) -> torch.Tensor:
    """The magnitudes of a type's grid, a row a word: int64 of 8 weights, int32 of 4."""
    return packed(_of_package(name)).to(device)


@cache
def _shifted_grid(device: torch.device) -> torch.Tensor:
    """int64 [4096]: 8 times the grid of IQ1_S, plus 1, then minus 1; the sign is bit 11 of a row's number."""
    grid = 8 * _of_package("IQ1_S")
    return packed(torch.cat([grid + 1, grid - 1])).to(device)


def _of_package(name: str) -> torch.Tensor:
    import gguf  # here, because few models need it and it is slow to import

    kind = getattr(gguf.quants, name)
    kind.init_grid()
    return torch.from_numpy(kind.grid).view(kind.grid_shape)


DECODERS: dict[str, Decoder] = {
    "IQ1_S": iq1_s,
    "IQ1_M": iq1_m,
    "IQ2_XXS": iq2_xxs,
    "IQ2_XS": iq2_xs,
    "IQ2_S": iq2_s,
    "IQ3_XXS": iq3_xxs,
    "IQ3_S": iq3_s,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
}
