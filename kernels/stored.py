"""A call over a cache: what is stored of its keys and values, and what a kernel reads back.

    q' = H q    k' = C(H k)    v' = C(H v)    out = H attend(q', k', v')

H is the cache's rotation, of blocks that may differ between K and V, or none; C is what the codec makes of
numbers. Kernels compute on q', k' and v' and undo the rotation of V on the result; `held` says the same
keys and values in the coordinates that the caller knows, H k' and H v'.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from verify.kernels.cache import Quantised, dequantise, quantise
from verify.kernels.cache_types import CacheSpec, RotationBlocks
from verify.kernels.call import Call
from verify.kernels.rotation import rotate


class StoredCall(NamedTuple):
    """call: q', k', v' in the call's own type; k, v: as they are stored; rotation: what is to be undone."""

    call: Call
    k: Quantised
    v: Quantised
    rotation: RotationBlocks

    def undone(self, out: torch.Tensor) -> torch.Tensor:
        """A result [..., Dv] on k' and v', in the caller's coordinates."""
        return rotate(out, self.rotation.v)


def store(call: Call, cache: CacheSpec) -> StoredCall:
    """What a cache of one layer's kind (`CacheSpec.at`) makes of a call. Raises ValueError on head sizes.

    Where v is columns of k (`Call.v_in_k`), it is those of k as it is stored, whatever the type of V.
    """
    columns, own = call.v_in_k, call.q.dtype
    rotation = cache.blocks(call.shape.k_size, call.shape.v_size)
    if columns is not None:
        rotation = rotation._replace(v=rotation.k)
        if rotation.k and (columns[0] % rotation.k or columns[1] % rotation.k):
            raise ValueError(
                f"cache: v is columns {columns} of k, which cut blocks of {rotation.k} of its rotation"
            )
    # Telling what is seen waits for the device.
    seen = seen_cells(call) if rotation.k or rotation.v or cache.looks_ahead else None
    k, v = (
        quantise(_rotated(x, block, seen, kind), kind, scale=cache.scale, seen=seen)
        for x, block, kind in ((call.k, rotation.k, cache.k), (call.v, rotation.v, cache.v))
    )
    read_k = call.k if k.codes is call.k else dequantise(k).to(own)
    if columns is not None:
        read_v = read_k[..., slice(*columns)]
    else:
        read_v = call.v if v.codes is call.v else dequantise(v).to(own)
    q = rotate(call.q.float(), rotation.k).to(own) if rotation.k else call.q
    return StoredCall(replace(call, q=q, k=read_k, v=read_v), k, v, rotation)


def seen_cells(call: Call) -> torch.Tensor:
    """Which cells of the cache some row may see, [B, S], of pages [P, page]."""
    its_rows = call.rows_of_sequences()
    lengths = [int(call.kv_len[b, rows].max()) if rows.stop > rows.start else 0 for b, rows in its_rows]
    longest = torch.tensor(lengths, device=call.k.device)
    if call.block_table is None:
        return torch.arange(call.k.shape[1], device=call.k.device) < longest[:, None]
    cells = torch.zeros(call.k.shape[:2], dtype=torch.bool, device=call.k.device)
    pages, page = call.k.shape[:2]
    table = call.block_table.long()
    first = torch.arange(table.shape[1], device=call.k.device) * page
    for inside in range(page):
        used = (first + inside < longest[:, None]) & (table >= 0) & (table < pages)
        cells[table[used], inside] = True
    return cells


def held(call: Call, cache: CacheSpec) -> Call:
    """The call with keys and values as the cache holds them: what exact attention over it is of.

    Rotated ones are float32 numbers, whatever the type of q: they have no 16 bits in these coordinates.
    """
    stored, columns = store(call, cache), call.v_in_k
    k, v = (
        rotate(x.float(), block) if block else x
        for x, block in ((stored.call.k, stored.rotation.k), (stored.call.v, stored.rotation.v))
    )
    return replace(call, k=k, v=v if columns is None else k[..., slice(*columns)])


def kept(x: torch.Tensor, kind: str, block: int, scale: str) -> torch.Tensor:
    """Keys or values [..., D] as a cache gives them back in the caller's coordinates and x's own type.

    kind, scale: of the cache; block: of its rotation. For scales that do not look at other keys.
    """
    if kind == "f16" and not block:
        return x
    back = dequantise(quantise(rotate(x.float(), block), kind, scale=scale))
    return rotate(back, block).to(x.dtype)


def _rotated(x: torch.Tensor, block: int, seen: torch.Tensor | None, kind: str) -> torch.Tensor:
    """Keys or values [B, S, Hkv, D] as the codec gets them, in float32, or for f16 in their own type; cells
    that no row sees are 0: rotated they may not be finite."""
    if not block:
        return x
    assert seen is not None
    rotated = rotate(x.masked_fill(~seen[..., None, None], 0.0).float(), block)
    return rotated.to(x.dtype) if kind == "f16" else rotated
