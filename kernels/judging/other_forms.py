"""The same call in another form: pages, packed tokens, a mask or lists of keys. The right answer is the same.

Each takes a call without pages, with q in rows of the batch; what is not to be read in the new form is NaN or
names nothing. A probe or a family is asked in a form by these, and so are laws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from verify.kernels.call import Call
from verify.kernels.lengths import lengths_of

# Entries of a table beyond a sequence's last page, in turn: none, the largest number, a page of another.
STALE = (-1, 2**31 - 1, 0)


def in_pages(
    call: Call,
    page: int,
    *,
    seed: int = 0,
    shared: int = 0,
    spare: int = 3,
    above: int = 0,
    stale: Sequence[int] = STALE,
    unnamed: float = math.nan,
    rest: float = math.nan,
) -> Call:
    """Keys and values in pages of `page` keys, in a drawn order among `spare` pages that no table names.

    shared: so many pages of the first sequence stand in the table of each: whoever asks vouches that their
    keys are the same; above: pages before the first that is used, which hold 0 and, untouched, take no memory
    on a CPU; stale: entries of a table beyond its sequence's last page, in turn; unnamed, rest: what pages
    hold that no table names, and what keys in a last page hold that no row sees. Raises ValueError for a call
    that has pages.
    """
    if call.block_table is not None:
        raise ValueError("block_table: expected a call without pages")
    generator = torch.Generator().manual_seed(seed)
    longest = [max(n, default=0) for n in _lengths(call)]
    needed = [-(-n // page) for n in longest]
    width = max(-(-call.shape.keys // page), *needed, 1) + 1
    count = sum(needed) + max(spare, 1)
    ids = (torch.randperm(count, generator=generator) + above).tolist()
    columns = call.v_in_k
    k, v = (x.new_zeros((above + count, page, *x.shape[2:])) for x in (call.k, call.v))
    if columns is not None:
        v = k[..., slice(*columns)]
    for pool in (k, v):
        pool[above:] = unnamed
    if columns is not None:
        v = k[..., slice(*columns)]
    tables: list[list[int]] = []
    for b, n in enumerate(longest):
        own = [ids.pop() for _ in range(needed[b])]
        if tables:
            own[:shared] = tables[0][: min(shared, len(own))]
        for i, name in enumerate(own):
            held = slice(i * page, min((i + 1) * page, n))
            for pool, x in ((k, call.k), (v, call.v)):
                pool[name, : held.stop - held.start] = x[b, held]
                pool[name, held.stop - held.start :] = rest
        tables.append(own + [stale[(b + i) % len(stale)] for i in range(width - len(own))])
    mask = call.mask
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, width * page - mask.shape[-1]))
    table = torch.tensor(tables, dtype=torch.int32, device=call.q.device).view(len(tables), width)
    return replace(call, k=k, v=v, mask=mask, block_table=table).checked()


def packed(call: Call, tokens: Sequence[int] | None = None) -> Call:
    """The rows of each sequence one after another; tokens [B]: only its first so many (all).

    Raises ValueError for a call that is packed.
    """
    if call.cu_seqlens is not None:
        raise ValueError("cu_seqlens: expected a call whose tokens are not packed")
    batch, rows = call.q.shape[:2]
    counts = torch.tensor([rows] * batch if tokens is None else list(tokens), dtype=torch.int32)
    own = (torch.arange(rows) < counts[:, None]).flatten().to(call.q.device)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int().to(call.q.device)
    mask = call.mask
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1).transpose(1, 2).flatten(0, 1)[own].transpose(0, 1)[None]
    return replace(
        call,
        q=call.q.flatten(0, 1)[own][None],
        kv_len=call.kv_len.flatten()[own][None],
        keys=None if call.keys is None else call.keys.flatten(0, 1)[own][None],
        mask=mask,
        cu_seqlens=starts,
    ).checked()


def masked(call: Call, *, numbers: bool = False) -> Call:
    """What kv_len and the window hide, said by a mask: of truth values, or of 0 and -inf.

    Every row's kv_len becomes its sequence's longest. Raises ValueError for ALiBi, which counts from kv_len,
    and for a call that has a mask or is packed.
    """
    if call.alibi_slopes is not None or call.mask is not None or call.cu_seqlens is not None:
        raise ValueError("mask: expected a call without mask and ALiBi slopes, and not packed")
    places, n_kv = torch.arange(call.shape.keys, device=call.q.device), call.kv_len[..., None]
    seen = places < n_kv
    if call.sliding_window is not None:
        seen = seen & (places >= n_kv - call.sliding_window)
    mask = seen[:, None]
    if numbers:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -math.inf)
    longest = call.kv_len.amax(1, keepdim=True).expand_as(call.kv_len).contiguous()
    return replace(call, kv_len=longest, mask=mask, sliding_window=None).checked()


def listed(call: Call, *, order: int | None = None, most: int | None = None) -> Call:
    """Each row lists the keys that it sees: all, in their order, or (order) in one drawn by this seed.

    most: so many of the list alone, which is another call. Holes (-1) stand at its end, with `order` in its
    middle too. Raises ValueError for a call that has lists.
    """
    if call.keys is not None:
        raise ValueError("keys: expected a call without lists")
    width = max(lengths_of(call.kv_len).greatest, 1) + (order is not None)
    places = torch.arange(width, dtype=torch.int32)
    keys = places.expand(*call.q.shape[:2], -1).clone()
    n_kv = call.kv_len.cpu()
    keys[keys >= n_kv[..., None]] = -1
    if order is not None:
        generator = torch.Generator().manual_seed(order)
        shuffled = torch.rand(keys.shape, generator=generator).argsort(-1)
        keys = keys.gather(-1, shuffled)
    if most is not None:
        keys = keys[..., :most]
    return replace(call, keys=keys.contiguous().to(call.q.device)).checked()


def several(call: Call, n_q: int) -> Call:
    """Rows n_q at a time on the path `several`, each such chunk a sequence of its own over the same keys.

    Rows that the last chunk lacks see nothing. Raises ValueError for a call that is packed or has pages.
    """
    if call.cu_seqlens is not None or call.block_table is not None:
        raise ValueError("cu_seqlens, block_table: expected a call without them")
    chunks = max(-(-call.q.shape[1] // n_q), 1)
    mask = call.mask
    if mask is not None:
        mask = mask.expand(len(call.q), -1, -1, -1).transpose(1, 2)
        mask = in_chunks(mask, n_q).transpose(1, 2)
    return replace(
        call,
        q=in_chunks(call.q, n_q),
        k=call.k.repeat_interleave(chunks, 0),
        v=call.v.repeat_interleave(chunks, 0),
        kv_len=in_chunks(call.kv_len, n_q),
        keys=None if call.keys is None else in_chunks(call.keys, n_q, -1),
        mask=mask,
        path="several",
    ).checked()


def with_tree(call: Call, parents: Sequence[int]) -> Call:
    """A call whose rows are drafts of a tree: row t has the key `kv_len - T + t` and sees it, those of its
    ancestors, and all keys before the drafts.

    parents [T]: of each row the row that it follows, or -1; kv_len of every row is that of its sequence with
    all drafts. Raises ValueError for a call that has a mask, or rows that do not fit.
    """
    rows, longest = len(parents), call.kv_len.amax(1)
    if call.mask is not None or call.q.shape[1] != rows or int(longest.min()) < rows:
        raise ValueError(f"parents: expected one of each of {call.q.shape[1]} rows, no more than keys")
    own = torch.zeros((rows, rows), dtype=torch.bool)
    for t, parent in enumerate(parents):
        own[t, t] = True
        if parent >= 0:
            own[t] |= own[parent]
    places = torch.arange(call.shape.keys)
    mask = (places < (longest.cpu() - rows)[:, None, None, None]).repeat(1, 1, rows, 1)
    for b, n in enumerate(longest.tolist()):
        mask[b, 0, :, n - rows : n] = own
    every = longest[:, None].expand(-1, rows).contiguous()
    return replace(call, kv_len=every, mask=mask.to(call.q.device)).checked()


def in_chunks(x: torch.Tensor, n_q: int, fill: float = 0) -> torch.Tensor:
    """[B, T, ...] as [B * chunks, n_q, ...], what the last chunk lacks filled."""
    missing = -x.shape[1] % n_q or (n_q if not x.shape[1] else 0)
    more = x.new_full((x.shape[0], missing, *x.shape[2:]), fill)
    return torch.cat((x, more), 1).unflatten(1, (-1, n_q)).flatten(0, 1).contiguous()


def _lengths(call: Call) -> list[tuple[int, ...]]:
    """kv_len of the rows of each sequence."""
    lengths, width = lengths_of(call.kv_len).of_rows, call.q.shape[1]
    found = []
    for batch, rows in call.rows_of_sequences():
        found.append(lengths[batch * width + rows.start : batch * width + rows.stop])
    return found
