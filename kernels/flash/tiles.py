"""Tile sizes of `flash`, chosen by what one call is and by how much shared memory the device has.

The choice never looks at head groups, KV cuts, batch or lengths, so that every plan of a call runs the same
binary. Keys a tile divide `block`, on whose multiples the plan cuts: a smaller tile changes the arithmetic
(and the trace says so), never the cuts.
"""

from __future__ import annotations

from typing import NamedTuple

SMALLEST_KEYS = 16
SMALLEST_HEAD, LARGEST_K_HEAD, LARGEST_V_HEAD = 16, 576, 512
LARGEST_GROUP = 64


# Query tokens from which tiles of the path prefill have 128 rows at head sizes of 128.
LONG_WINDOW = 8192
# Rows of a matrix tile that one warpgroup multiplies at a time (wgmma, compute capability 9.0).
WARPGROUP_ROWS = 64


class HeadSplit(NamedTuple):
    """A head size as a power of two and a rest that is padded to a power of two (0: no rest)."""

    first: int
    rest: int


class Tiles(NamedTuple):
    """rows: M of the matrix tile; keys a tile; warps a program; stages of the load pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def split_head(size: int, rows: int = 16) -> HeadSplit:
    """80 as 64 + 16, 96 as 64 + 32, 192 as 128 + 64, 576 as 512 + 64; a power of two has no rest.

    In tiles of 64 rows or more no piece is narrower than 64 (80 is 64 + 64, of which 48 are padding): with
    narrower ones Triton 3.6 gave wrong results from warpgroup products on compute capability 9.0 (decode with
    48 and 64 heads a group, head sizes 80 and 96: relative errors of 0.1 to 0.5).
    """
    narrowest = 64 if rows >= 64 else 16
    first = max(1 << (size.bit_length() - 1), narrowest)
    rest = max(size - first, 0)
    return HeadSplit(first, max(next_power_of_two(rest), narrowest) if rest else 0)


def shared_bytes(
    tiles: Tiles, k_size: int, v_size: int, item_size: int, v_is_k: bool, *, tensor_cores: bool = True
) -> int:
    """Shared memory that a program needs, from above: the load pipeline, q and P where they pass through it.

    Tested against what Triton compiles for several devices.
    """
    k_padded, v_padded = sum(split_head(k_size, tiles.rows)), sum(split_head(v_size, tiles.rows))
    if not tensor_cores:
        # Products are float32 sums over operands that pass through shared memory in float32.
        widest = max(split_head(k_size, tiles.rows).first, split_head(v_size, tiles.rows).first)
        return 4 * (tiles.rows + tiles.keys) * max(k_padded, widest) + 1024
    key_bytes = (k_padded + (0 if v_is_k else v_padded)) * item_size
    # Warpgroup products (from 64 rows, compute capability 9.0) hold a stage's operands while they run.
    buffers = tiles.stages if tiles.rows >= 64 else max(tiles.stages - 1, 1)
    q_and_p = tiles.rows * (k_padded + tiles.keys) * item_size
    return buffers * tiles.keys * key_bytes + q_and_p + 1024


def _in_warpgroup_tiles(k_size: int, v_size: int, item_size: int) -> bool:
    """Whether a head is of a size, and of 16 bits, for which tiles of 64 rows were measured."""
    return k_size == v_size and k_size in (64, 128) and item_size == 2


def window_tiles(
    alone: Tiles,
    k_size: int,
    v_size: int,
    *,
    item_size: int,
    v_is_k: bool,
    shared_limit: int,
    capability: tuple[int, int],
) -> Tiles:
    """Tiles in which rows of a window of the path decode lie side by side, each with the bits that it has in
    the tile `alone`: as many keys; 64 rows where products of 64 rows were seen to have the bits of products
    of 16 (compute capability 9.0, tests/cuda/test_flash_cuda.py; before it there is one instruction for
    both), else as many rows.
    """
    fits = _in_warpgroup_tiles(k_size, v_size, item_size) and alone.keys == 64 and alone.rows < WARPGROUP_ROWS
    wide = Tiles(WARPGROUP_ROWS, alone.keys, 4, 3)
    fits = fits and (8, 0) <= capability < (10, 0)
    if fits and shared_bytes(wide, k_size, v_size, item_size, v_is_k) <= shared_limit:
        return wide
    return alone


def choose_tiles(
    ratio: int,
    k_size: int,
    v_size: int,
    *,
    tokens: int | None,
    window: int = 0,
    block: int,
    item_size: int,
    v_is_k: bool,
    shared_limit: int,
    tensor_cores: bool = True,
) -> Tiles | None:
    """The largest tiles that fit in `shared_limit` bytes; None where not even the smallest do.

    ratio: query heads a KV head, 1 to 64; tokens: that a tile should hold, None for as many as do; window:
    query tokens of the call, by which those that hold as many as do are chosen; block: keys a tile at most;
    item_size: bytes a number of the cache; tensor_cores: whether Triton multiplies on them (from compute
    capability 8.0).
    """
    widest = max(k_size, v_size)
    fewest = max(next_power_of_two(ratio), 16)
    rows = max(fewest, 128 if widest <= 128 or k_size == v_size == 256 else 64)
    small = tokens is None and tensor_cores and _in_warpgroup_tiles(k_size, v_size, item_size)
    if small and (widest == 64 or window < LONG_WINDOW):
        # Two programs a multiprocessor, of which one takes its exponentials while the other multiplies, are
        # faster than one of twice the rows, but where the keys of a long window are read too often for it
        # (benchmarks/results/h200-prefill-tiles.json).
        rows = max(fewest, WARPGROUP_ROWS)
    if tokens is not None:
        rows = min(max(next_power_of_two(tokens * ratio), fewest), rows)
    while rows >= fewest:
        warps = 8 if rows >= 128 or rows * widest >= 128 * 128 or widest > 256 else 4
        keys = block & -block
        while keys >= SMALLEST_KEYS:
            # Deep enough to hide memory, and no deeper: with few rows a fourth stage of 32 KiB gains 2 to 4 %
            # and a fifth loses it again (H200); with 64 or more it gains nothing.
            deep = (keys * widest < 64 * 128 and not small) or (rows < 64 and widest <= 128)
            for stages in (4, 3, 2) if deep else (3, 2):
                tiles = Tiles(rows, keys, warps, stages)
                need = shared_bytes(tiles, k_size, v_size, item_size, v_is_k, tensor_cores=tensor_cores)
                if need <= shared_limit:
                    return tiles
            keys //= 2
        rows //= 2
    return None
