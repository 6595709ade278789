"""The one contract every attention kernel keeps, and the check of what it is given.

    attend(q, k, v, *, kv_len, scale, ...) -> AttentionOutput(out, lse)

    q      [B, T, Hq, Dk]   query tokens; float16, bfloat16 or float32
    k      [B, S, Hkv, Dk]  keys, Hq = r * Hkv: query heads h*r .. h*r+r-1 read KV head h
    v      [B, S, Hkv, Dv]  values
    kv_len [B, T] int32     row t sees keys 0 .. kv_len[b, t] - 1; 0 is an empty row
    out    [B, T, Hq, Dv]   float32
    lse    [B, T, Hq]       float32, natural logarithm of the sum of exp(logit), sinks included

An empty row gives out = 0 and lse = -inf. On the decode path every row is computed as if it were alone: one
query token against its own prefix. On the prefill path rows share tiles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from kernels.arithmetic import Arithmetic
from kernels.cache import through_cache
from kernels.capabilities import Capabilities
from kernels.lengths import lengths_of
from kernels.merge import Merge
from kernels.plan import Plan
from kernels.trace import LaunchTrace

Path = Literal["decode", "prefill"]
PATHS: tuple[Path, ...] = ("decode", "prefill")
FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class AttentionOutput(NamedTuple):
    """out [B, T, Hq, Dv] and lse [B, T, Hq]; float32, or float64 from the oracle."""

    out: torch.Tensor
    lse: torch.Tensor


class Shape(NamedTuple):
    """Sizes of one call: B batch, T query rows, S keys held, r query heads a KV head."""

    batch: int
    rows: int
    keys: int
    q_heads: int
    kv_heads: int
    k_size: int
    v_size: int

    @property
    def ratio(self) -> int:
        return self.q_heads // self.kv_heads


@dataclass(frozen=True)
class Call:
    """One call whose arguments fit together (see `checked_call`); shapes as in the module's text."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_len: torch.Tensor
    scale: float
    path: Path
    shape: Shape
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    plan: Plan | None = None


class Kernel(ABC):
    """A kernel that was built from a specification.

    `spec` is the text it was built from, `trace` what it has launched so far, `notes` what a reader of the
    verdict must know (a fallback that ran in its place, say), `cache` the type of its own KV cache, f16 where
    keys and values stay as they are given.
    """

    cache = "f16"

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.trace = LaunchTrace()
        self.notes: list[str] = []

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        kv_len: torch.Tensor,
        scale: float,
        path: Path = "decode",
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
        plan: Plan | None = None,
    ) -> AttentionOutput:
        """Attention of the contract above; `plan` overrides the one of the specification.

        Raises ValueError on inputs that do not fit together, KernelFailure if the kernel fails on good ones.
        """
        return self.run(
            checked_call(
                q,
                k,
                v,
                kv_len=kv_len,
                scale=scale,
                path=path,
                sliding_window=sliding_window,
                softcap=softcap,
                sinks=sinks,
                alibi_slopes=alibi_slopes,
                plan=plan,
            )
        )

    @abstractmethod
    def run(self, call: Call) -> AttentionOutput:
        """What an implementation provides: compute the call, and record in `trace` what was launched."""

    def launcher(self, call: Call) -> Callable[[], AttentionOutput]:
        """The call, ready to be launched many times; host work that need not be repeated is done here."""
        return lambda: self.run(call)

    @abstractmethod
    def arithmetic(self, shape: Shape, path: Path) -> Arithmetic:
        """The roundings of this kernel at this shape: what its error budget is derived from."""

    def arithmetic_of(self, call: Call) -> Arithmetic:
        """The same for one call: a kernel that computes and answers in its inputs' type knows it here."""
        return self.arithmetic(call.shape, call.path)

    def capabilities(self) -> Capabilities:
        """What this kernel can be asked for. An implementation that has less than everything says so."""
        return Capabilities()

    def held(self, call: Call) -> Call:
        """The call with keys and values as this kernel's own cache holds them: what its budget is for.

        A kernel whose specification has a quantised `cache=` answers for its arithmetic on these numbers,
        expanded to the call's own type: a kernel that does not round them so counts it in u_k and u_v.
        What quantising them costs is measured as distance to `call`, and judged as such.
        """
        if self.cache == "f16":
            return call
        return replace(call, k=through_cache(call.k, self.cache), v=through_cache(call.v, self.cache))

    def merger(self) -> Merge | None:
        """The merge that this kernel combines its parts by, where it can be called by itself."""
        return None

    def forgive(self) -> None:
        """Ask a kernel again that hung: one in a process of its own is not asked twice by itself."""
        return None

    def close(self) -> None:
        """Give back what the kernel holds outside this process."""
        return None


def checked_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kv_len: torch.Tensor,
    scale: float,
    path: Path = "decode",
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
        if x.dtype not in FLOAT_TYPES:
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
    shape = Shape(batch, rows, k.shape[1], q_heads, kv_heads, k_size, v.shape[3])
    return Call(q, k, v, kv_len, scale, path, shape, sliding_window, softcap, sinks, alibi_slopes, plan)
