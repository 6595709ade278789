"""Asking a kernel of which nothing is known: chosen logits, chosen values, and what comes back.

Attention is a sum with Dv independent columns, so one call is Dv experiments a KV head on the same logits;
and each query head of a KV head may have logits of its own on the same values:

    k_jc = L_cj, q_h = 8 e_c, scale = 1/8    gives query head h the logits s_j = L_cj

exactly, where every L has at most 8 significant bits: q, k, their products and any sum of them are then
numbers of every 16-bit type. `asked` is a bare callable; nothing else of the kernel enters.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
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
# More keys than any tile: so many are looked at where one is looked for.
PROBED_KEYS = 1100


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


class ValueColumns(NamedTuple):
    """Columns of values that are 0 but for some keys: keys [m], columns [m] and values [m] of these."""

    keys: torch.Tensor
    at: torch.Tensor
    values: torch.Tensor
    width: int  # how many columns

    def some(self, start: int, stop: int) -> ValueColumns:
        """Columns start .. stop-1, counted from 0."""
        stop = min(stop, self.width)
        chosen = (self.at >= start) & (self.at < stop)
        return ValueColumns(self.keys[chosen], self.at[chosen] - start, self.values[chosen], stop - start)


def columns(entries: Sequence[Mapping[int, float]]) -> ValueColumns:
    """A column an entry: values by key."""
    every = [(key, c, value) for c, entry in enumerate(entries) for key, value in entry.items()]
    keys, at, values = zip(*every, strict=True) if every else ((), (), ())
    return ValueColumns(
        torch.tensor(keys, dtype=torch.int64),
        torch.tensor(at, dtype=torch.int64),
        torch.tensor(values, dtype=torch.float64),
        len(entries),
    )


def at_keys(keys: torch.Tensor | int, values: torch.Tensor) -> ValueColumns:
    """A column a value: that value at its key, or all at one."""
    at = torch.arange(len(values))
    return ValueColumns(torch.as_tensor(keys).expand(len(values)), at, values.double(), len(values))


def together(these: Sequence[ValueColumns]) -> ValueColumns:
    """Columns of the first, then those of the second, and so on."""
    first = [0, *itertools.accumulate(each.width for each in these)]
    return ValueColumns(
        torch.cat([each.keys for each in these]),
        torch.cat([each.at + start for each, start in zip(these, first, strict=False)]),
        torch.cat([each.values for each in these]),
        first[-1],
    )


class Asking:
    """A bare kernel in one regime; `calls` counts what it was asked."""

    def __init__(self, asked: BareKernel, regime: Regime) -> None:
        self.asked, self.regime, self.calls = asked, regime, 0

    def call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = SCALE) -> torch.Tensor:
        """out of one call, as float64 on the CPU. The last row sees every key, each before it one key less.

        q [B, T, Hq, D], k and v [B, S, Hkv, D], numbers of the regime's type, which may be held in another.
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

    @property
    def patterns_a_head(self) -> int:
        """Rows of logits that a KV head takes in a call: a dimension of q and k each, and one for a base."""
        return min(self.regime.ratio, self.regime.k_size - 1)

    def weigh(
        self, logits: torch.Tensor, values: ValueColumns, *, scale: float = SCALE, base: float = 0.0
    ) -> torch.Tensor:
        """[P, C] results of each row of logits [P, n] on each column of values; float64.

        The logits are as given at the scale of 1/8, and else 8 scale times that. Columns are spread over KV
        heads and calls; rows of logits over the query heads of a group. base: added to every logit, through
        one more dimension.
        """
        r = self.regime
        found = torch.empty(len(logits), values.width, dtype=torch.float64)
        for first in range(0, len(logits), self.patterns_a_head):
            some = logits[first : first + self.patterns_a_head]
            q, k = self._logits([some] * r.kv_heads, base)
            for start in range(0, values.width, r.columns):
                these = values.some(start, start + r.columns)
                out = self.call(q, k, self._values(these), scale)[-1, -1]  # [Hq, Dv]
                by_pattern = out.view(r.kv_heads, r.ratio, r.size).transpose(0, 1).flatten(1)
                found[first : first + len(some), start : start + these.width] = by_pattern[
                    : len(some), : these.width
                ]
        return found

    def weigh_own(
        self, logits: torch.Tensor, values: Sequence[ValueColumns], *, scale: float = SCALE, base: float = 0.0
    ) -> list[torch.Tensor]:
        """Results of each row of logits [P, n] on columns of its own, of which a row has at most `own`.

        Rows are spread over query heads, KV heads and calls; scale and base as of `weigh`.
        """
        r, each, width = self.regime, min(self.patterns_a_head, self.regime.size), self.own
        found: list[torch.Tensor] = []
        for first in range(0, len(logits), each * r.kv_heads):
            heads = logits[first : first + each * r.kv_heads].split(each)
            q, k = self._logits([*heads, *[heads[0]] * (r.kv_heads - len(heads))], base)
            own = values[first : first + each * r.kv_heads]
            placed = []
            for i, one in enumerate(own):
                start = i // each * r.size + i % each * width
                placed.append(one._replace(at=one.at + start, width=r.columns))
            merged = together(placed)._replace(at=torch.cat([p.at for p in placed]), width=r.columns)
            out = self.call(q, k, self._values(merged), scale)[-1, -1].view(r.kv_heads, r.ratio, r.size)
            for i, one in enumerate(own):
                start = i % each * width
                found.append(out[i // each, i % each, start : start + one.width])
        return found

    @property
    def own(self) -> int:
        """ValueColumns that each row of logits has to itself in `weigh_own`."""
        return max(self.regime.size // self.patterns_a_head, 1)

    def _logits(self, heads: Sequence[torch.Tensor], base: float) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B, T, Hq, D] and k [B, S, Hkv, D] that give the query heads of each KV head these rows."""
        r = self.regime
        q = torch.zeros(r.batch, r.n_q, r.kv_heads, r.ratio, r.k_size, dtype=r.dtype, device=r.device)
        k = torch.zeros(r.batch, r.n_kv, r.kv_heads, r.k_size, dtype=r.dtype, device=r.device)
        if base:
            q[..., -1], k[..., -1] = _QUERY, base
        same = all(rows is heads[0] for rows in heads)
        for i, rows in enumerate(heads[:1] if same else heads):
            at = slice(None) if same else slice(i, i + 1)
            group = torch.arange(r.ratio, device=r.device)
            q[:, :, at, group, group.clamp(max=len(rows) - 1)] = _QUERY
            # Narrow before it is turned, and turned where it goes.
            k[:, :, at, : len(rows)] = rows.to(r.dtype).to(r.device).T[None, :, None]
        return q.flatten(2, 3), k

    def _values(self, these: ValueColumns) -> torch.Tensor:
        """v [B, S, Hkv, Dv] with at most as many columns as a call has."""
        r = self.regime
        v = torch.zeros(r.batch, r.n_kv, r.columns, dtype=r.dtype, device=r.device)
        v[:, these.keys.to(r.device), these.at.to(r.device)] = these.values.to(r.dtype).to(r.device)
        return v.view(r.batch, r.n_kv, r.kv_heads, r.size)

    def level(self, keys: torch.Tensor | list[int], other: float = DEAD, at: float = 0.0) -> torch.Tensor:
        """A row of logits [1, n]: `at` for some keys, `other` for the rest."""
        row = torch.full((1, self.regime.n_kv), other, dtype=torch.float64)
        row[0, keys] = at
        return row
