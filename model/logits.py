"""Logits of the last hidden states, a part of the vocabulary and a tile of rows at a time.

The output matrix comes in slices of its rows, so that logits of the whole vocabulary never lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from verify.model.products import Products, tile_rows

# First window of a slab, name of the arm.
State = tuple[int, str]
# Rows of a tile of logits at most, and rows of the embedding or output matrix decoded at once.
CPU_LOGIT_ROWS, GPU_LOGIT_ROWS = 128, 2048
VOCABULARY_ROWS = 8192


class LogitSlice(NamedTuple):
    """Logits of some scored positions for some of the vocabulary: arm name -> [tile, vocabulary].

    The group's scored positions, window by window, are its rows; `rows` are the ones of this slice, all of
    one slab, and tensors have as many rows as a tile, those beyond len(rows) of no meaning. logits: of the
    arms that took the slab; arms whose hidden states are one tensor share one here too. All rows of a part
    of the vocabulary come before the next part. The tensors are overwritten by the next slice.
    """

    rows: range
    vocabulary: range
    logits: dict[str, torch.Tensor]


def logit_slices(
    states: Mapping[State, torch.Tensor],
    slabs: Sequence[range],
    *,
    scored: int,
    parts: Sequence[range],
    output: Callable[[range], torch.Tensor],
    finish: Callable[[torch.Tensor, range], torch.Tensor],
    products: Products,
) -> Iterator[LogitSlice]:
    """states: normed hidden states of the scored positions, [windows of the slab * scored, width]; slabs: of
    windows; parts: of the vocabulary, in order; output: rows of the output matrix; finish: what follows
    its product, in place."""
    by_slab: dict[int, dict[str, torch.Tensor]] = {}
    for (first, name), state in states.items():
        by_slab.setdefault(first, {})[name] = state
    tile = GPU_LOGIT_ROWS
    if any(state.device.type == "cpu" for state in states.values()):
        tile = min(CPU_LOGIT_ROWS, tile_rows(scored))
    products = products.with_tile(tile)
    distinct = max((len({id(state) for state in arms.values()}) for arms in by_slab.values()), default=0)
    for part in parts:
        matrix = output(part)
        buffers = [matrix.new_empty((tile, len(part))) for _ in range(distinct)]
        for slab in slabs:
            arms = by_slab.get(slab.start, {})
            for first in range(0, len(slab) * scored, tile):
                rows = range(first, min(first + tile, len(slab) * scored))
                found: dict[int, torch.Tensor] = {}
                for state in arms.values():
                    if id(state) not in found:
                        found[id(state)] = buffers[len(found)]
                        finish(products(state[rows.start : rows.stop], matrix, out=found[id(state)]), part)
                of_group = range(slab.start * scored + rows.start, slab.start * scored + rows.stop)
                yield LogitSlice(of_group, part, {name: found[id(x)] for name, x in arms.items()})
