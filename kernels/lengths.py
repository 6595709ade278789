"""Visible keys of every row as numbers of the host, read from the device once a tensor.

A model asks with the same tensor at every layer and arm; each time the host would wait for the device.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

_MOST_KEPT = 32


class RowLengths(tuple[int, ...]):
    """Visible keys of rows; hashed once, since plans are looked up by all of them at every call."""

    _hash: int

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            self._hash = super().__hash__()
            return self._hash


class Lengths(NamedTuple):
    """of_rows: the numbers of kv_len [B, T], flattened; of_first: those of the first sequence where all have
    the same, else None; least, greatest: of all, 0 where there are none."""

    of_rows: RowLengths
    of_first: RowLengths | None
    least: int
    greatest: int


_kept: dict[int, tuple[weakref.ref[torch.Tensor], int, Lengths]] = {}


def lengths_of(kv_len: torch.Tensor) -> Lengths:
    """The lengths of kv_len [B, T]. A tensor that was written to is read again."""
    kept = _kept.get(id(kv_len))
    if kept is not None and kept[0]() is kv_len and kept[1] == kv_len._version:
        return kept[2]
    rows = RowLengths(kv_len.flatten().tolist())
    first = RowLengths(rows[: kv_len.shape[-1]])
    alike = rows == tuple(first) * (len(rows) // max(len(first), 1))
    lengths = Lengths(rows, first if alike else None, min(rows, default=0), max(rows, default=0))
    if len(_kept) >= _MOST_KEPT:
        _kept.clear()
    _kept[id(kv_len)] = weakref.ref(kv_len), kv_len._version, lengths
    return lengths
