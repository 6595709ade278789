"""Sizes of inputs to draw, and what every call of a model's layers has."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from verify.kernels.call import AttentionPath
from verify.kernels.heads import Heads

SIX_A_KV_HEAD = Heads(12, 2, 64, 64)


@dataclass(frozen=True)
class InputSizes:
    """Sizes of the inputs to draw, and the options that every call of a model's layers has.

    Raises ValueError where `fewer` is not one number a sequence.
    """

    n_kv: tuple[int, ...] = (257, 200)  # visible keys of each row, so T = len(n_kv)
    batch: int = 1  # sequences
    fewer: tuple[int, ...] = ()  # keys by which each sequence's rows are shorter; empty: by none
    heads: Heads = SIX_A_KV_HEAD  # of the layer
    spare: int = 5  # keys held beyond the longest row
    edges: tuple[int, ...] = (64, 128, 192)  # keys where something is cut: KV parts, tiles
    dtype: torch.dtype = torch.float16  # of q, k and v
    path: AttentionPath = "decode"  # of the call
    v_in_k: bool = False  # V is a view of the first v_size numbers of K (MLA)
    sliding_window: int | None = None  # of the layers: in families that draw none of their own
    sinks: bool = False  # likewise

    def __post_init__(self) -> None:
        if self.fewer and len(self.fewer) != self.batch:
            raise ValueError(f"fewer: expected {self.batch} numbers, one a sequence, got {len(self.fewer)}")

    @property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Visible keys of every sequence's rows [B][T]: a row that sees keys keeps one of them."""
        return tuple(
            tuple(n - min(less, max(n - 1, 0)) for n in self.n_kv) for less in self.fewer or (0,) * self.batch
        )

    @property
    def keys(self) -> int:
        return max(self.n_kv) + self.spare

    @property
    def scale(self) -> float:
        return self.heads.k_size**-0.5
