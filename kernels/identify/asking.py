"""Asking a kernel of which nothing is known: chosen logits, chosen values, and what comes back.

Attention is a sum with Dv independent columns, so one call is Dv experiments a KV head on the same logits;
and each query head of a KV head may have logits of its own on the same values:

    k_jc = L_cj, q_h = 8 e_c, scale = 1/8    gives query head h the logits s_j = L_cj

exactly, where every L has at most 8 significant bits: q, k, their products and any sum of them are then
numbers of every 16-bit type. `asked` is a bare callable; nothing else of the kernel enters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from verify.kernels.call import AttentionPath
from verify.kernels.errors import KernelFailure
from verify.kernels.kernel import Kernel

# (q, k, v, *, kv_len, scale) -> out [B, T, Hq, Dv], a tensor of any float type.
BareKernel = Callable[..., torch.Tensor]
SCALE = 0.125
_QUERY = 8.0
# The logit of a key that shall have no weight: exp(-64) is 2^-92.
DEAD = -64.0
# A number of every 16-bit type which no 16-bit sum overflows, and whose last place is even: a tie with half
# of its last place goes down.
LARGE = 49152.0


def bare(kernel: Kernel, path: AttentionPath) -> BareKernel:
    """A kernel without all that it says of itself."""

    def asked(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, kv_len: torch.Tensor, scale: float
    ) -> torch.Tensor:
        return kernel.attend(q, k, v, kv_len=kv_len, scale=scale, path=path).out

    return asked


class NotIdentifiable(Exception):
    """Why nothing can be read off this kernel; the message is the whole story."""


class Regime(NamedTuple):
    """Sizes of the calls that are made: everything that a kernel's choice of path may depend on."""

    n_kv: int  # keys that the last row sees
    n_q: int = 1  # query tokens of a sequence
    batch: int = 1  # sequences
    ratio: int = 4  # query heads a KV head
    kv_heads: int = 2  # of the call
    size: int = 64  # of values
    k_size: int = 64  # of queries and keys
    dtype: torch.dtype = torch.float16  # of q, k and v
    device: str = "cpu"  # that calls lie on

    @property
    def columns(self) -> int:
        """Experiments of one call."""
        return self.kv_heads * self.size


class Asking:
    """A bare kernel in one regime; `calls` counts what it was asked."""

    def __init__(self, asked: BareKernel, regime: Regime) -> None:
        self.asked, self.regime, self.calls = asked, regime, 0

    def call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = SCALE) -> torch.Tensor:
        """out of one call, as float64 on the CPU. The last row sees every key, each before it one key less.

        q [B, T, Hq, D], k and v [B, S, Hkv, D], in float64; they must be numbers of the regime's type.
        Raises NotIdentifiable where the kernel fails.
        """
        r = self.regime
        rows, keys = q.shape[1], k.shape[1]
        kv_len = torch.arange(keys - rows + 1, keys + 1, dtype=torch.int32).clamp(min=1)
        given = [x.to(r.dtype).to(r.device).contiguous() for x in (q, k, v)]
        self.calls += 1
        try:
            out = self.asked(
                *given, kv_len=kv_len.expand(q.shape[0], rows).contiguous().to(r.device), scale=scale
            )
        except (KernelFailure, NotImplementedError) as failure:
            raise NotIdentifiable(f"it fails at {keys} keys: {failure}") from None
        return out.double().cpu()

    def weigh(
        self, logits: torch.Tensor, values: torch.Tensor, *, scale: float = SCALE, base: float = 0.0
    ) -> torch.Tensor:
        """[P, C] results of each row of logits [P, n] on each column of values [n, C]; float64.

        The logits are as given at the scale of 1/8, and else 8 scale times that. Columns are spread over KV
        heads and calls; rows of logits over the query heads of a group. base: added to every logit, through
        one more dimension.
        """
        r = self.regime
        patterns, n = logits.shape
        # A dimension of q and k each, and one for the base.
        at_once = min(r.ratio, r.k_size - 1)
        found = torch.empty(patterns, values.shape[1], dtype=torch.float64)
        for first in range(0, patterns, at_once):
            some = logits[first : first + at_once]
            heads = torch.arange(r.ratio).clamp(max=len(some) - 1)
            q = torch.zeros(r.batch, r.n_q, r.kv_heads, r.ratio, r.k_size, dtype=torch.float64)
            q[..., torch.arange(r.ratio), heads] = _QUERY
            if base:
                q[..., -1] = _QUERY
            k = torch.zeros(r.batch, n, r.kv_heads, r.k_size, dtype=torch.float64)
            k[..., : len(some)] = some.T[None, :, None]
            if base:
                k[..., -1] = base
            for start in range(0, values.shape[1], r.columns):
                columns = values[:, start : start + r.columns]
                padded = torch.zeros(n, r.columns, dtype=torch.float64)
                padded[:, : columns.shape[1]] = columns
                v = padded.view(1, n, r.kv_heads, r.size).expand(r.batch, -1, -1, -1)
                out = self.call(q.flatten(2, 3), k, v, scale)[-1, -1]  # [Hq, Dv]
                by_pattern = out.view(r.kv_heads, r.ratio, r.size).transpose(0, 1).flatten(1)
                found[first : first + len(some), start : start + r.columns] = by_pattern[
                    : len(some), : columns.shape[1]
                ]
        return found

    def level(self, keys: torch.Tensor | list[int], other: float = DEAD, at: float = 0.0) -> torch.Tensor:
        """A row of logits [1, n]: `at` for some keys, `other` for the rest."""
        row = torch.full((1, self.regime.n_kv), other, dtype=torch.float64)
        row[0, keys] = at
        return row

    def columns(self, entries: list[dict[int, float]]) -> torch.Tensor:
        """Values [n, C], each column 0 but for some keys."""
        values = torch.zeros(self.regime.n_kv, len(entries), dtype=torch.float64)
        for c, entry in enumerate(entries):
            for key, value in entry.items():
                values[key, c] = value
        return values
