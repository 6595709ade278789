"""What a call of tensors at hand may have beside q, k and v, and the record of a call made of it.

verify.exact_attention(q, k, v, causal=True)
verify.budget(q, k_pages, v_pages, block_table=table, kv_len=lengths)
verify.assert_attention(q, k, v, out, layout="thd", cu_seqlens=starts, cu_seqlens_k=starts_k)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, TypedDict, get_args

import torch

from verify.kernels.call import Call, checked_call
from verify.kernels.errors import nearest
from verify.machine.errors import UsageError

Layout = Literal["bshd", "bhsd", "thd"]


class CallOptions(TypedDict, total=False):
    """Keywords that `exact_attention`, `budget` and `assert_attention` share; each may be left out."""

    # Order of dimensions of q, k, v, out and lse; default bshd.
    layout: Layout
    # Keys that each row sees: [B, T], or [B], or one number; packed [sum T]. Default all keys.
    kv_len: torch.Tensor | Sequence[int] | int | None
    # A triangle whose last row sees the last key; beside pages, key kv_len[b] - 1.
    causal: bool
    # Of the product of q and k; default Dk^-1/2.
    scale: float | None
    # A row sees its newest keys alone, so many.
    sliding_window: int | None
    # c tanh(s / c) of every logit.
    softcap: float | None
    # [Hq], a logit a head with no value.
    sinks: torch.Tensor | None
    # [Hq], slope * (key - newest key) is added to the logit.
    alibi_slopes: torch.Tensor | None
    # [B or 1, Hq or 1, T, S]: True where a key is seen, or numbers that are added to logits.
    mask: torch.Tensor | None
    # [B, T, K] int32: the row sees these keys alone, -1 is none; packed [sum T, K].
    keys: torch.Tensor | None
    # [B, pages] int32; k and v are then pages [P, page, H, D], bhsd [P, H, page, D].
    block_table: torch.Tensor | None
    # [B + 1] int32, with layout thd: where each sequence's tokens begin in q, and in k and v.
    cu_seqlens: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None


def call_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: CallOptions) -> Call:
    """The call of the contract. Raises UsageError."""
    given: dict[str, Any] = dict(options)
    if unknown := [name for name in given if name not in CallOptions.__annotations__]:
        raise UsageError(
            f"{unknown[0]}: no such keyword{nearest(unknown[0], CallOptions.__annotations__)} (known:"
            f" {', '.join(CallOptions.__annotations__)})"
        )
    layout, kv_len = given.pop("layout", "bshd"), given.pop("kv_len", None)
    causal, scale = given.pop("causal", False), given.pop("scale", None)
    starts_k = given.pop("cu_seqlens_k", None)
    table, starts = given.get("block_table"), given.get("cu_seqlens")
    if layout not in get_args(Layout):
        raise UsageError(f"layout={layout!r}: expected one of {', '.join(get_args(Layout))}")
    if layout != "thd" and not (starts is None and starts_k is None):
        raise UsageError("cu_seqlens: expected layout='thd', q [sum T, Hq, D], beside it")
    if starts_k is not None and (starts is None or table is not None):
        raise UsageError("cu_seqlens_k: expected cu_seqlens and no block_table beside it")
    packed_keys = layout == "thd" and table is None and (starts is None or starts_k is not None)
    dims = {"q": 3 if layout == "thd" else 4} | dict.fromkeys("kv", 3 if packed_keys else 4)
    for (name, n), x in zip(dims.items(), (q, k, v), strict=True):
        if not isinstance(x, torch.Tensor) or x.dim() != n:
            got = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise UsageError(f"{name}: expected a tensor of {n} dimensions (layout={layout}), got {got}")
    try:
        tokens, counts = _sizes(q, k, layout, starts, starts_k, table)
        q, k, v = (x.detach() for x in (q, k, v))
        q = canonical(q, layout)
        if starts_k is not None:
            k, v = (_padded(x, counts) for x in (k, v))
        elif layout == "bhsd" or packed_keys:
            k, v = canonical(k, layout), canonical(v, layout)
        rows = list(q.shape[:2]) if starts is None else [sum(tokens)]
        if causal:
            own = _of_sequences(kv_len, len(tokens)) if kv_len is not None and table is not None else counts
            if kv_len is not None and table is None:
                raise UsageError("causal=True, kv_len: expected one of them: kv_len says what each row sees")
            lengths = torch.tensor([n for pair in zip(tokens, own, strict=True) for n in _triangle(*pair)])
            lengths = lengths.view(rows)
        elif kv_len is None:
            if table is not None:
                raise UsageError("kv_len: expected how many keys each row sees, beside block_table")
            pairs = zip(tokens, counts, strict=True)
            lengths = torch.tensor([n for t, count in pairs for n in [count] * t]).view(rows)
        else:
            lengths = _spread(torch.as_tensor(kv_len).cpu(), tokens, rows)
        return checked_call(
            q, k, v, kv_len=lengths.to(torch.int32).contiguous().to(q.device),
            scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
            path="decode" if max(tokens, default=1) == 1 else "prefill", **given,
        )  # fmt: skip
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from None


def _sizes(
    q: torch.Tensor,
    k: torch.Tensor,
    layout: str,
    starts: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    table: torch.Tensor | None,
) -> tuple[list[int], list[int]]:
    """Query tokens of each sequence, and how many keys it holds: of pages, what its table has room for."""
    if starts is None:
        tokens = [q.shape[0]] if layout == "thd" else [q.shape[2 if layout == "bhsd" else 1]] * len(q)
    else:
        tokens = _differences(starts, "cu_seqlens", len(q))
    if starts_k is not None:
        counts = _differences(starts_k, "cu_seqlens_k", len(k))
        if len(counts) != len(tokens):
            raise UsageError(
                f"cu_seqlens_k: {len(counts)} sequences, expected the {len(tokens)} of cu_seqlens"
            )
        return tokens, counts
    held = k.shape[0] if k.dim() == 3 else k.shape[2 if layout == "bhsd" else 1]
    return tokens, [held * (1 if table is None else table.shape[-1])] * len(tokens)


def _differences(starts: torch.Tensor, name: str, held: int) -> list[int]:
    """Tokens of each sequence. Raises UsageError."""
    if not isinstance(starts, torch.Tensor) or starts.dim() != 1 or not len(starts):
        raise UsageError(f"{name}: expected a tensor [B + 1]")
    found = starts.tolist()
    if found[0] != 0 or found[-1] != held or any(b < a for a, b in pairwise(found)):
        raise UsageError(f"{name}: expected to rise from 0 to the {held} tokens, got {found}")
    return [b - a for a, b in pairwise(found)]


def _padded(x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[sum S, H, D] as [B, max S, H, D]: what lies beyond a sequence's keys is seen by no row."""
    found = x.new_zeros((len(counts), max(counts, default=0), *x.shape[1:]))
    first = 0
    for b, n in enumerate(counts):
        found[b, :n] = x[first : first + n]
        first += n
    return found


def _triangle(rows: int, keys: int) -> range:
    if rows > keys:
        raise UsageError(f"causal=True: {rows} rows over {keys} keys: the first would see none")
    return range(keys - rows + 1, keys + 1)


def _of_sequences(kv_len: Any, sequences: int) -> list[int]:
    """One number a sequence. Raises UsageError."""
    lengths = torch.as_tensor(kv_len)
    if lengths.dim() > 1 or lengths.numel() not in (1, sequences):
        raise UsageError(
            f"kv_len: expected [B] = [{sequences}] or a number beside causal=True, got {list(lengths.shape)}"
        )
    found: list[int] = lengths.expand(sequences).tolist()
    return found


def _spread(lengths: torch.Tensor, tokens: list[int], rows: list[int]) -> torch.Tensor:
    """kv_len of every row [B, T], packed [sum T]. Raises UsageError."""
    packed = len(rows) == 1
    if lengths.dim() == 1 and not packed:
        lengths = lengths[:, None]
    if packed and list(lengths.shape) == [len(tokens)] and len(tokens) != rows[0]:
        return lengths.repeat_interleave(torch.tensor(tokens))
    try:
        return lengths.expand(rows)
    except RuntimeError:
        wanted = f"[sum T] = {rows}" if packed else f"[B, T] = {rows}"
        raise UsageError(f"kv_len: expected {wanted}, [B] or a number, got {list(lengths.shape)}") from None


def canonical(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Into our order of dimensions; of an lse too, which has one less."""
    if layout == "bhsd" and x.dim() >= 3:
        return x.transpose(1, 2)
    return x[None] if layout == "thd" else x


def back(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Into the layout's order of dimensions."""
    if layout == "bhsd":
        return x.transpose(1, 2)
    return x[0] if layout == "thd" else x
