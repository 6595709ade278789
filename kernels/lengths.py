"""Visible keys of every row as numbers of the host, read from the device.

A model asks with the same tensor at every layer and arm, and each time the host would wait for the device:
what it owns, and writes to no more, it asks to have kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch


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


# By identity of the tensor; an entry goes with it.
_kept: dict[int, tuple[weakref.ref[torch.Tensor], Lengths]] = {}


def keep_lengths(kv_len: torch.Tensor) -> torch.Tensor:
    """kv_len, whose lengths are read now and never again: nobody may write to it from here on."""
    return _keep(kv_len, _read(kv_len))


def known_lengths(kv_len: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """kv_len [1, T], whose lengths the host has from elsewhere: nobody may write to it from here on."""
    of_rows = RowLengths(rows)
    assert kv_len.shape == (1, len(of_rows)), (kv_len.shape, len(of_rows))
    return _keep(kv_len, Lengths(of_rows, of_rows, min(of_rows, default=0), max(of_rows, default=0)))


def first_sequence(kv_len: torch.Tensor) -> torch.Tensor:
    """kv_len [1, T] of the first sequence, known already where all have the same lengths."""
    lengths, first = lengths_of(kv_len), kv_len[:1]
    return first if lengths.of_first is None else _keep(first, lengths._replace(of_rows=lengths.of_first))


def lengths_of(kv_len: torch.Tensor) -> Lengths:
    """The lengths of kv_len [B, T]."""
    kept = _kept.get(id(kv_len))
    return kept[1] if kept is not None and kept[0]() is kv_len else _read(kv_len)


def _keep(kv_len: torch.Tensor, lengths: Lengths) -> torch.Tensor:
    key = id(kv_len)
    _kept[key] = weakref.ref(kv_len, lambda _: _kept.pop(key, None)), lengths
    return kv_len


def unseen_keys(rows: Sequence[int], keys: int, window: int | None) -> tuple[slice, slice]:
    """Of a sequence that holds so many keys, those that none of its rows sees: before the sliding window of
    the shortest row that sees any, and beyond the longest row. rows: visible keys of each."""
    seeing = [n for n in rows if n]
    oldest = max(min(seeing) - window, 0) if window is not None and seeing else 0
    return slice(0, oldest), slice(max(rows, default=0), keys)


def _read(kv_len: torch.Tensor) -> Lengths:
    rows = RowLengths(kv_len.flatten().tolist())
    first = RowLengths(rows[: kv_len.shape[-1]])
    alike = rows == tuple(first) * (len(rows) // max(len(first), 1))
    return Lengths(rows, first if alike else None, min(rows, default=0), max(rows, default=0))
