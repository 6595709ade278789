"""The one contract every attention kernel keeps: the record of a call, and what a kernel gives for it.

    attend(q, k, v, *, kv_len, scale, ...) -> Result(out, lse, launched)

    q      [B, T, Hq, Dk]   query tokens; float16, bfloat16 or float32
    k      [B, S, Hkv, Dk]  keys, Hq = r * Hkv: query heads h*r .. h*r+r-1 read KV head h
    v      [B, S, Hkv, Dv]  values
    kv_len [B, T] int32     row t sees keys 0 .. kv_len[b, t] - 1; 0 is an empty row
    out    [B, T, Hq, Dv]   float32
    lse    [B, T, Hq]       float32, natural logarithm of the sum of exp(logit), sinks included
    launched                what the call launched, counted where it ran (`trace`)

Three paths. `decode`: every row is computed as if it were alone, one query token against its own prefix.
`several`: 1 to 16 tokens of a sequence in one call, as speculation has them; a row's plan is still a rule of
its own keys. `prefill`: rows share tiles.

Forms that a call may have beside, in any combination (`docs/contract.md` shows them):

    pages      k [P, page, Hkv, Dk], v alike, block_table [B, pages] int32: keys i*page .. (i+1)*page - 1 of
               sequence b lie in page block_table[b, i]. Entries that no row of b needs may be anything, and
               so may pages that no table names. S is pages * page
    packed     q [sum T, Hq, Dk], kv_len [sum T], keys [sum T, K] and cu_seqlens [B + 1] int32: tokens
               cu_seqlens[b] .. cu_seqlens[b + 1] - 1 are sequence b's. The record holds them as one row of
               the batch, [1, sum T, ...], and so are out and lse
    mask       [B or 1, Hq or 1, T, S], True where a key is seen, or a number that is added to its logit
               (after the softcap), -inf where it is hidden; of packed tokens [1, Hq or 1, sum T, S]. What
               kv_len, a window or a list hides stays hidden
    keys       [B, T, K] int32: the row sees these keys alone, each below its kv_len; -1 is none
    v_in_k     (first, stop): V is columns first .. stop-1 of K, in the same memory; v is left out

ALiBi counts from the row's last key: slope * (j - (kv_len - 1)) is added to the logit of key j, so that the
last key's is not changed. Another origin gives the same out, and an lse that is shifted by slope * c.
A row that sees nothing gives out = 0 and lse = -inf (with sinks: the sink).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch

from verify.kernels.call_checks import check_call
from verify.kernels.heads import Heads, OfHeads
from verify.kernels.plans.asked import MOST_SEVERAL, PREFILL_TOKENS, RowAsked
from verify.kernels.plans.plan import Plan
from verify.kernels.trace import Launched

AttentionPath = Literal["decode", "several", "prefill"]
PATHS: tuple[AttentionPath, ...] = ("decode", "several", "prefill")
# Those that a run of a model measures, `--path both` included.
RUN_PATHS: tuple[AttentionPath, ...] = ("decode", "prefill")


@dataclass(frozen=True, eq=False)
class AttentionOutput:
    """out [B, T, Hq, Dv] and lse [B, T, Hq]; float32, or float64 from the oracle."""

    out: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True, eq=False)
class Result(AttentionOutput):
    """What a kernel gives for a call, and what it launched for it."""

    launched: Launched


class _ShapeFields(NamedTuple):
    batch: int
    rows: int
    keys: int
    heads: Heads


class Shape(_ShapeFields, OfHeads):
    """Sizes of one call: B batch, T query rows, S keys that a row may see, and its heads.

    Of packed tokens B is 1 and T all tokens; of a paged call S is what its table has room for.
    """

    __slots__ = ()

    def asked(self, path: AttentionPath, cache_type: str = "f16") -> RowAsked:
        """What a plan is asked about rows of a plain call of this shape; cache_type: of the kernel's own."""
        n_q = {"decode": 1, "several": min(max(self.rows, 1), MOST_SEVERAL), "prefill": PREFILL_TOKENS}[path]
        return RowAsked(self.heads, n_q=n_q, cache_type=cache_type)


@dataclass(frozen=True, eq=False)
class Call:
    """One call; shapes as in the module's text. `checked` says whether its arguments fit together."""

    q: torch.Tensor  # [B, T, Hq, Dk]; packed [1, sum T, Hq, Dk]
    k: torch.Tensor  # [B, S, Hkv, Dk]; paged [P, page, Hkv, Dk]
    v: torch.Tensor  # [B, S, Hkv, Dv]; paged [P, page, Hkv, Dv]
    kv_len: torch.Tensor  # [B, T] int32
    scale: float  # of the product of q and k
    path: AttentionPath = "decode"  # how rows are computed together
    sliding_window: int | None = None  # a row sees so many of its newest keys
    softcap: float | None = None  # c: logits become c tanh(logit / c)
    sinks: torch.Tensor | None = None  # [Hq], the logit of one more key, whose value is 0
    alibi_slopes: torch.Tensor | None = None  # [Hq]
    mask: torch.Tensor | None = None  # [B or 1, Hq or 1, T, S], bool or added to logits
    keys: torch.Tensor | None = None  # [B, T, K] int32, the keys that a row sees, -1 for none
    block_table: torch.Tensor | None = None  # [B, pages] int32
    cu_seqlens: torch.Tensor | None = None  # [B + 1] int32, where packed sequences begin in q
    plan: Plan | None = None  # in the place of the kernel's own
    layer: int | None = None  # of the model that makes the call: caches may differ by layer
    # Sequences that an engine would tell its dispatch of. Those of the batch are none by themselves: windows
    # lie side by side for speed, each as if alone.
    told_sequences: int = 1

    @property
    def shape(self) -> Shape:
        """Sizes of the call."""
        q, k = self.q.shape, self.k.shape
        keys = k[1] if self.block_table is None else k[1] * self.block_table.shape[1]
        return Shape(q[0], q[1], keys, Heads(q[2], k[2], q[3], self.v.shape[3]))

    @property
    def has_forms(self) -> bool:
        """Whether it has pages, packed tokens, a mask or lists of keys."""
        return any(form is not None for form in (self.block_table, self.cu_seqlens, self.mask, self.keys))

    @property
    def sequences(self) -> int:
        """B, how many sequences there are, whatever form q has."""
        return self.q.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def rows_of_sequences(self) -> list[tuple[int, slice]]:
        """Where the rows of each sequence lie: the index of the batch, and the rows there."""
        if self.cu_seqlens is None:
            return [(b, slice(0, self.q.shape[1])) for b in range(self.q.shape[0])]
        starts = self.cu_seqlens.tolist()
        return [(0, slice(start, end)) for start, end in pairwise(starts)]

    @property
    def n_kv(self) -> torch.Tensor:
        """[B, T]: keys that each row goes through, by which plans cut it: kv_len, or how many it lists."""
        return self.kv_len if self.keys is None else (self.keys >= 0).sum(-1, dtype=self.kv_len.dtype)

    @property
    def v_in_k(self) -> tuple[int, int] | None:
        """(first, stop) where v is those columns of k, in the same memory."""
        k, v = self.k, self.v
        if k.shape[:3] != v.shape[:3] or k.stride() != v.stride() or k.numel() == 0:
            return None
        if k.untyped_storage().data_ptr() != v.untyped_storage().data_ptr():
            return None
        first = (v.storage_offset() - k.storage_offset()) // (k.stride(3) or 1)
        inside = first >= 0 and first + v.shape[3] <= k.shape[3]
        return (first, first + v.shape[3]) if inside and v.shape[3] < k.shape[3] else None

    def on(self, device: torch.device) -> Call:
        """The call with its tensors on a device."""
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {n: x.to(device) for n, x in every.items() if isinstance(x, torch.Tensor)}
        return Call(**(every | moved))

    def of_rows(self, rows: torch.Tensor) -> Call:
        """The call of some rows [n] of each sequence alone. Raises ValueError for packed tokens, whose
        sequences have rows of their own."""
        if self.cu_seqlens is not None:
            raise ValueError("cu_seqlens: rows of packed sequences cannot be narrowed alike")
        return replace(
            self,
            q=self.q[:, rows].contiguous(),
            kv_len=self.kv_len[:, rows].contiguous(),
            mask=None if self.mask is None else self.mask[:, :, rows],
            keys=None if self.keys is None else self.keys[:, rows],
        )

    def asked(self, cache_type: str = "f16") -> RowAsked:
        """What a plan is asked about rows of this call. Batch and number of rows never enter; n_q is what
        engines tell a kernel, the most tokens that a sequence of the call has, and sequences what
        `told_sequences` says."""
        asked = self.shape.asked(self.path, cache_type)
        if self.path == "several" and self.cu_seqlens is not None:
            asked = asked._replace(n_q=max(int(self.cu_seqlens.diff().max()), 1))
        return asked._replace(
            sequences=self.told_sequences,
            sinks=self.sinks is not None,
            sliding_window=self.sliding_window is not None,
            alibi=self.alibi_slopes is not None,
            key_list=self.keys is not None,
        )

    def checked(self) -> Call:
        """This call, if its arguments fit together. Raises ValueError naming the argument, the place in it
        that does not fit, and what was expected."""
        if self.path not in PATHS:
            raise ValueError(f"path: expected decode, several or prefill, got {self.path!r}")
        check_call(self)
        return self


def checked_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None = None,
    *,
    v_in_k: tuple[int, int] | None = None,
    **options: Any,
) -> Call:
    """The call of these arguments: further ones as `Call` has them, packed ones in either form.

    Raises ValueError naming the argument, what it is and what was expected.
    """
    if v_in_k is not None:
        v = _columns(k, v, v_in_k)
    if v is None:
        raise ValueError("v: expected values, or v_in_k, the columns of K that they are")
    if options.get("cu_seqlens") is not None:
        # Packed tokens are one row of the batch.
        given: dict[str, tuple[torch.Tensor | None, int]] = {
            "kv_len": (options.get("kv_len"), 1),
            "keys": (options.get("keys"), 2),
        }
        options |= {name: x[None] for name, (x, dims) in given.items() if x is not None and x.dim() == dims}
        q = q[None] if q.dim() == 3 else q
    return Call(q=q, k=k, v=v, **options).checked()


def _columns(k: torch.Tensor, v: torch.Tensor | None, v_in_k: tuple[int, int]) -> torch.Tensor:
    """The view of K that V is."""
    first, stop = v_in_k
    if not 0 <= first < stop <= k.shape[-1]:
        raise ValueError(f"v_in_k: expected columns within 0 to {k.shape[-1]} of K, got {first} to {stop}")
    columns = k[..., first:stop]
    if v is not None and (v.data_ptr() != columns.data_ptr() or v.shape != columns.shape):
        raise ValueError(f"v: given beside v_in_k, and not columns {first} to {stop} of K's own memory")
    return columns
