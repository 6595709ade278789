"""Attention weights rewritten for other head shapes that compute the same function.

Query heads are repeated, KV heads that nothing reads are put among the live ones, heads are padded with
zeros, and rows that NORM rotation expects are permuted for NEOX. What a layer computes stays what it was:

    out = sum over heads h of O_h attention(Q_h x, K x, V x)
        = sum over heads h and copies c of (s_c O_h) attention(Q_h x, K x, V x),   sum over c of s_c = 1
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from verify.model.errors import ModelError


def unequal_shares(copies: int) -> list[float]:
    """`copies` different binary fractions that sum to one: 1, 2, ..., and the rest, over a power of two."""
    small = list(range(1, copies))
    whole = 1
    while whole - sum(small) < copies:
        whole *= 2
    return [n / whole for n in [*small, whole - sum(small)]]


@dataclass(frozen=True)
class HeadShape:
    """From the heads of a layer to copies of them, over more KV heads, of another size."""

    heads: int  # query heads, before
    kv_heads: int  # before
    size: int  # of a head, before
    copies: int  # of each query head
    all_kv_heads: int  # after
    live: tuple[int, ...]  # places of the original KV heads among them
    new_size: int  # of a head, after
    neox: bool  # rows are permuted from NORM rotation of the first `size` dimensions to NEOX
    seed: int = 0  # of the weights of the dead heads
    # Query heads a KV head that ask for noise and that nothing reads, for ratios that are no multiple.
    idle: int = 0

    def __post_init__(self) -> None:
        if self.idle < 0:
            raise ModelError(f"idle heads: {self.idle}, expected at least 0")
        if self.copies < 1:
            raise ModelError(f"copies: {self.copies}, expected at least 1")
        if len(set(self.live)) != self.kv_heads or len(self.live) != self.kv_heads:
            raise ModelError(f"live KV heads: {list(self.live)}, expected {self.kv_heads} different places")
        if not all(0 <= place < self.all_kv_heads for place in self.live):
            raise ModelError(f"live KV heads: {list(self.live)}, expected places below {self.all_kv_heads}")
        if self.new_size < self.size:
            raise ModelError(f"head size: {self.new_size}, expected at least {self.size}")

    @property
    def ratio(self) -> int:
        """Query heads a KV head, before copies."""
        return self.heads // self.kv_heads

    @property
    def all_heads(self) -> int:
        return self.all_kv_heads * (self.ratio * self.copies + self.idle)

    def query(self, weight: torch.Tensor, layer: int) -> torch.Tensor:
        """[H D, E] to [H' D', E]: copies h0 h1 h2 h0 ..., times sqrt(D'/D) for the scale 1/sqrt(D')."""
        width = weight.shape[1]
        heads = self._padded(weight.view(self.kv_heads, self.ratio, self.size, width), rotated=True)
        heads = heads * math.sqrt(self.new_size / self.size)
        heads = heads.repeat(1, self.copies, 1, 1)
        if self.idle:
            generator = torch.Generator().manual_seed(self.seed * 1009 + layer + 7)
            noise = torch.randn((len(heads), self.idle, *heads.shape[2:]), generator=generator)
            heads = torch.cat((heads, noise * heads.square().mean().sqrt()), 1)
        return self._placed(heads, layer, 0).reshape(-1, width)

    def key(self, weight: torch.Tensor, layer: int) -> torch.Tensor:
        """[Hkv D, E] to [Hkv' D', E]."""
        width = weight.shape[1]
        heads = self._padded(weight.view(self.kv_heads, 1, self.size, width), rotated=True)
        return self._placed(heads, layer, 1).reshape(-1, width)

    def value(self, weight: torch.Tensor, layer: int) -> torch.Tensor:
        """[Hkv D, E] to [Hkv' D', E]."""
        width = weight.shape[1]
        heads = self._padded(weight.view(self.kv_heads, 1, self.size, width), rotated=False)
        return self._placed(heads, layer, 2).reshape(-1, width)

    def output(self, weight: torch.Tensor) -> torch.Tensor:
        """[E, H D] to [E, H' D']: shared out unequally among copies, zero for dead heads and padding."""
        width = weight.shape[0]
        heads = weight.T.reshape(self.kv_heads, self.ratio, self.size, width)
        heads = self._padded(heads, rotated=False)
        shares = unequal_shares(self.copies)
        copies = torch.cat([heads * share for share in shares], 1)
        copies = torch.nn.functional.pad(copies, (0, 0, 0, 0, 0, self.idle))
        out = copies.new_zeros((self.all_kv_heads, *copies.shape[1:]))
        out[list(self.live)] = copies
        return out.reshape(-1, width).T.contiguous()

    def _padded(self, heads: torch.Tensor, *, rotated: bool) -> torch.Tensor:
        """[Hkv, n, D, E] to [Hkv, n, D', E], rows of q and k in the order of the rotation."""
        if rotated and self.neox:
            heads = torch.cat((heads[:, :, 0::2], heads[:, :, 1::2]), 2)
        return torch.nn.functional.pad(heads, (0, 0, 0, self.new_size - self.size))

    def _placed(self, heads: torch.Tensor, layer: int, which: int) -> torch.Tensor:
        """[Hkv, n, D', E] among dead heads. Those hold noise, so that reading one shows."""
        generator = torch.Generator().manual_seed((self.seed * 1009 + layer) * 3 + which)
        shape = (self.all_kv_heads, *heads.shape[1:])
        out = torch.randn(shape, generator=generator) * heads.square().mean().sqrt()
        out[list(self.live)] = heads
        return out
