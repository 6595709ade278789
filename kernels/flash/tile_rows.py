"""Which keys a program of `flash` goes through, and which of them each row of its tile sees: device code."""

# Triton's functions are not typed.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def part_bounds(n_kv, part, parts, tiles_a_part, BLOCK: tl.constexpr):
    """First key, end and number of parts of rows with n_kv keys: `KVCuts.cuts`, in the same integers.

    A part beyond the row's last is empty: its first key and its end are n_kv. tiles_a_part: of parts of a
    given size; below 0 of `auto`: `tiles_to_fill`.
    """
    tiles = (n_kv + BLOCK - 1) // BLOCK
    count = tl.minimum(parts, tiles)
    if tiles_a_part < 0:
        full = tiles // -tiles_a_part
        shortest = tiles // 2
        if tiles_a_part >= -4:
            shortest = tl.maximum(shortest, tl.minimum(tiles, parts // 2))
        cheap = tl.minimum(parts // 2, 32)
        most = tl.maximum(tl.maximum(cheap, tl.minimum(full, 64)), full // 2)
        count = tl.minimum(tl.minimum(parts, shortest), most)
        count = tl.where(count > 32, count // 16 * 16, count)
    count = tl.maximum(count, 1)
    first, end = part * tiles // count, (part + 1) * tiles // count
    if tiles_a_part > 0:
        count = tl.maximum((tiles + tiles_a_part - 1) // tiles_a_part, 1)
        # Of the shape of n_kv, which may be that of several rows.
        first, end = part * tiles_a_part + 0 * tiles, (part + 1) * tiles_a_part + 0 * tiles
    return tl.minimum(first * BLOCK, n_kv), tl.minimum(end * BLOCK, n_kv), count


@triton.jit
def rows_see(
    inside,
    at,
    n_kv,
    own_begin,
    own_end,
    oldest,
    DECODE: tl.constexpr,
    SEVERAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Which rows see keys `at` of a tile, [1 or M, TILE]; inside [TILE]: those that some row may see."""
    visible = inside[None, :]
    if SEVERAL:
        visible = visible & (at[None, :] >= own_begin[:, None]) & (at[None, :] < own_end[:, None])
    elif not DECODE:
        visible = visible & (at[None, :] < n_kv)
    if WINDOW:
        visible = visible & (at[None, :] >= oldest)
    return visible


@triton.jit
def seen_by_all(
    live, lengths, own_begin, own_end, begin, end, window, SEVERAL: tl.constexpr, WINDOW: tl.constexpr
):
    """From where to where, in this part, each of the tile's rows sees every key."""
    if SEVERAL:
        first = tl.max(tl.where(live, own_begin, begin), 0)
        last = tl.min(tl.where(live, own_end, end), 0)
    else:
        first = begin
        last = tl.minimum(tl.min(tl.where(live, lengths, end), 0), end)
    if WINDOW:
        first = tl.maximum(first, tl.max(tl.where(live, lengths, 0), 0) - window)
    return first, last


@triton.jit
def in_bunches(tiles_a_bunch):
    """Tile and head of this program: some tiles of each head in turn, before the next ones, so that all of
    the longest rows come first, and programs that run side by side read the same keys."""
    tiles, heads = tl.num_programs(0), tl.num_programs(1)
    place = tl.program_id(0) + tl.program_id(1) * tiles
    first = place // (tiles_a_bunch * heads) * tiles_a_bunch
    of_bunch = place - first * heads
    size = tl.minimum(tiles_a_bunch, tiles - first)
    return first + of_bunch % size, of_bunch // size
