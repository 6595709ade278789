"""The one contract every attention kernel keeps, and the check of what it is given.

    attend(q, k, v, *, kv_len, scale, ...) -> Result(out, lse, launched)

    q      [B, T, Hq, Dk]   query tokens; float16, bfloat16 or float32
    k      [B, S, Hkv, Dk]  keys, Hq = r * Hkv: query heads h*r .. h*r+r-1 read KV head h
    v      [B, S, Hkv, Dv]  values
    kv_len [B, T] int32     row t sees keys 0 .. kv_len[b, t] - 1; 0 is an empty row
    out    [B, T, Hq, Dv]   float32
    lse    [B, T, Hq]       float32, natural logarithm of the sum of exp(logit), sinks included
    launched                what the call launched, counted where it ran (`trace`)

ALiBi counts from the row's last key: slope * (j - (kv_len - 1)) is added to the logit of key j, so that the
last key's is not changed. Another origin gives the same out, and an lse that is shifted by slope * c.
An empty row gives out = 0 and lse = -inf. On the decode path every row is computed as if it were alone: one
query token against its own prefix. On the prefill path rows share tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from verify.kernels.heads import Heads
from verify.kernels.lengths import lengths_of
from verify.kernels.plans.asked import PREFILL_TOKENS, RowAsked
from verify.kernels.plans.plan import Plan
from verify.kernels.trace import Launched

AttentionPath = Literal["decode", "prefill"]
PATHS: tuple[AttentionPath, ...] = ("decode", "prefill")
INPUT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class AttentionOutput:
    """out [B, T, Hq, Dv] and lse [B, T, Hq]; float32, or float64 from the oracle."""

    out: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True, eq=False)
class Result(AttentionOutput):
    """What a kernel gives for a call, and what it launched for it."""

    launched: Launched


class Shape(NamedTuple):
    """Sizes of one call: B batch, T query rows, S keys held, and its heads."""

    batch: int
    rows: int
    keys: int
    heads: Heads

    @property
    def ratio(self) -> int:
        return self.heads.ratio

    @property
    def q_heads(self) -> int:
        return self.heads.q

    @property
    def kv_heads(self) -> int:
        return self.heads.kv

    @property
    def k_size(self) -> int:
        return self.heads.k_size

    @property
    def v_size(self) -> int:
        return self.heads.v_size

    def asked(self, path: AttentionPath, cache_type: str = "f16") -> RowAsked:
        """What a plan is asked about rows of a plain call of this shape; cache_type: of the kernel's own."""
        return RowAsked(self.heads, n_q=1 if path == "decode" else PREFILL_TOKENS, cache_type=cache_type)


@dataclass(frozen=True)
class Call:
    """One call whose arguments fit together (see `checked_call`); shapes as in the module's text."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_len: torch.Tensor
    scale: float
    path: AttentionPath
    shape: Shape
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    plan: Plan | None = None

    def asked(self, cache_type: str = "f16") -> RowAsked:
        """What a plan is asked about rows of this call. Batch and number of rows never enter."""
        return self.shape.asked(self.path, cache_type)._replace(
            sinks=self.sinks is not None,
            sliding_window=self.sliding_window is not None,
            alibi=self.alibi_slopes is not None,
        )


def checked_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kv_len: torch.Tensor,
    scale: float,
    path: AttentionPath = "decode",
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    plan: Plan | None = None,
) -> Call:
    """The call, if its arguments fit together.

    Raises ValueError naming the argument, what it is and what was expected.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, T, H, D], got shape {list(x.shape)}")
        if x.dtype not in INPUT_TYPES:
            raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: on device {x.device}, q is on {q.device}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    batch, rows, q_heads, k_size = q.shape
    if k.shape[0] != batch or v.shape[0] != batch:
        raise ValueError(f"k, v: expected batch {batch} as q has, got {k.shape[0]} and {v.shape[0]}")
    if k.shape[3] != k_size:
        raise ValueError(f"k: expected head size {k_size} as q has, got {k.shape[3]}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"v: expected [B, S, Hkv] = {list(k.shape[:3])} as k has, got {list(v.shape[:3])}")
    kv_heads = k.shape[2]
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"q: {q_heads} query heads are not a multiple of {kv_heads} KV heads")
    if list(kv_len.shape) != [batch, rows]:
        raise ValueError(f"kv_len: expected shape [B, T] = {[batch, rows]}, got {list(kv_len.shape)}")
    if kv_len.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"kv_len: expected int32, got {kv_len.dtype}")
    if kv_len.numel():
        lengths = lengths_of(kv_len)
        low, high = lengths.least, lengths.greatest
        if low < 0 or high > k.shape[1]:
            raise ValueError(f"kv_len: expected values from 0 to S = {k.shape[1]}, got {low} to {high}")
    if path not in PATHS:
        raise ValueError(f"path: expected decode or prefill, got {path!r}")
    if sliding_window is not None and sliding_window <= 0:
        raise ValueError(f"sliding_window: expected at least 1, got {sliding_window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected a positive number, got {softcap}")
    for name, per_head in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if per_head is not None and list(per_head.shape) != [q_heads]:
            raise ValueError(f"{name}: expected shape [Hq] = [{q_heads}], got {list(per_head.shape)}")
    shape = Shape(batch, rows, k.shape[1], Heads(q_heads, kv_heads, k_size, v.shape[3]))
    return Call(
        q=q,
        k=k,
        v=v,
        kv_len=kv_len,
        scale=scale,
        path=path,
        shape=shape,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        plan=plan,
    )
