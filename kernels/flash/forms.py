"""What the form of a call adds to a launch: pages, packed tokens, masks and lists of keys, for the device.

A call without forms adds nothing: its launch has the same binary whether or not there are others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from verify.kernels.call import Call


class PackedTile(NamedTuple):
    """Packed tokens that share a matrix tile."""

    sequence: int
    first: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Forms:
    """Of one call. The default is that of a call without forms."""

    page: int = 0  # keys of a page; 0: K and V are no pages
    table: torch.Tensor | None = None  # [B, pages] int32
    listed: torch.Tensor | None = None  # [B, T, K] int32, keys that rows list, without holes between them
    last_key: torch.Tensor | None = None  # [B, T] int32, kv_len of rows that list their keys
    mask: torch.Tensor | None = None  # [B or 1, Hq or 1, T, S], uint8 or float32, last stride 1
    packed: tuple[PackedTile, ...] = ()  # where tokens are packed, in the order of their rows

    @property
    def kind(self) -> tuple[int, bool, str, bool]:
        """What of it chooses a binary."""
        of_mask = "" if self.mask is None else str(self.mask.dtype)
        return self.page, self.listed is not None, of_mask, bool(self.packed)

    def arguments(self, b: slice, t: slice, tile_rows: torch.Tensor | None) -> dict[str, Any]:
        """What the device code takes of rows t of sequences b, by the names of its parameters."""
        if self is PLAIN:
            return _NOTHING
        table, listed, last_key, mask = self.table, self.listed, self.last_key, self.mask
        if table is not None and tile_rows is None:
            table = table[b]
        if listed is not None and last_key is not None:
            listed, last_key = listed[b, t].contiguous(), last_key[b, t].contiguous()
        mask_b = mask_h = mask_t = 0
        if mask is not None:
            mask = mask[b if len(mask) > 1 else slice(None), :, t]
            # One for all is read again and again.
            steps = zip(mask.stride()[:3], mask.shape[:3], strict=True)
            mask_b, mask_h, mask_t = (step if count > 1 else 0 for step, count in steps)
        return {
            "tile_rows": tile_rows,
            "table": table,
            "listed": listed,
            "last_key": last_key,
            "mask": mask,
            "table_b": 0 if table is None else table.stride(0),
            "listed_t": 0 if listed is None else listed.shape[-1],
            "mask_b": mask_b,
            "mask_h": mask_h,
            "mask_t": mask_t,
            "PACKED": tile_rows is not None,
            "PAGE": self.page,
            "LISTED": listed is not None,
            "MASK": 0 if mask is None else 1 if mask.dtype == torch.uint8 else 2,
        }


PLAIN = Forms()
_NOTHING: dict[str, Any] = {
    **dict.fromkeys(("tile_rows", "table", "listed", "last_key", "mask")),
    **dict.fromkeys(("table_b", "listed_t", "mask_b", "mask_h", "mask_t"), 0),
    "PACKED": False, "PAGE": 0, "LISTED": False, "MASK": 0,
}  # fmt: skip


def forms_of(call: Call, tokens_a_tile: int) -> Forms:
    """The forms of a call whose matrix tiles hold so many tokens. Waits for the device where tokens are
    packed."""
    if not call.has_forms:
        return PLAIN
    table, listed, mask = call.block_table, call.keys, call.mask
    if table is not None:
        table = table.to(torch.int32).contiguous()
    last_key = None
    if listed is not None:
        last_key = call.kv_len.to(torch.int32).contiguous()
        # Holes go to the end; what is listed stays in its order.
        order = (listed < 0).to(torch.uint8).argsort(dim=-1, stable=True)
        listed = listed.to(torch.int32).gather(-1, order)
        if not listed.shape[-1]:
            listed = torch.nn.functional.pad(listed, (0, 1), value=-1)
    if mask is not None:
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask.to(torch.float32)
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
    packed = []
    if call.cu_seqlens is not None:
        for sequence, (_, rows) in enumerate(call.rows_of_sequences()):
            for first in range(rows.start, rows.stop, tokens_a_tile):
                packed.append(PackedTile(sequence, first, min(tokens_a_tile, rows.stop - first)))
    return Forms(
        page=0 if table is None else call.k.shape[1],
        table=table,
        listed=listed,
        last_key=last_key,
        mask=mask,
        packed=tuple(packed),
    )


def longest_first(tiles: Sequence[PackedTile], lengths: Sequence[int], t: slice) -> list[PackedTile]:
    """The tiles that begin among rows t, counted from the first of these: those with the most keys come
    first, so that short ones fill the end of a launch. lengths: keys of each row."""
    own = [tile for tile in tiles if t.start <= tile.first < t.stop]
    own.sort(key=lambda tile: -max(lengths[tile.first : tile.first + tile.tokens]))
    return [tile._replace(first=tile.first - t.start) for tile in own]
