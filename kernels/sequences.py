"""A call one sequence at a time, as plain tensors: pages gathered, packed tokens cut apart, lists made masks.

Whoever computes a call in plain torch goes through its sequences and knows no other form. What a call of one
tensor a sequence holds is seen where it lies; of pages, only those are read that a row of the sequence needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from verify.kernels.call import Call
from verify.kernels.lengths import lengths_of


@dataclass(frozen=True, eq=False)
class CallSequence:
    """One sequence of a call: T rows and S keys."""

    at: tuple[int, slice]  # where its rows lie in q: the index of the batch, and the rows there
    q: torch.Tensor  # [T, Hq, Dk]
    k: torch.Tensor  # [S, Hkv, Dk]
    v: torch.Tensor  # [S, Hkv, Dv]
    kv_len: torch.Tensor  # [T]
    lengths: tuple[int, ...]  # the same, on the host
    n_kv: tuple[int, ...]  # keys that each row goes through: kv_len, or how many it lists
    mask: torch.Tensor | None  # [Hq or 1, T, S], bool or added to logits
    positions: torch.Tensor | None = None  # [S], places of its keys where they are a list; None: 0 .. S-1

    def mask_of(
        self, rows: torch.Tensor | slice, keys: slice, heads: torch.Tensor, *, kv_heads: int
    ) -> torch.Tensor | None:
        """The mask of some rows [t], keys [n] and query heads [Hkv, g], as logits [Hkv, t, g, n] lie."""
        if self.mask is None:
            return None
        mask = self.mask[:, rows, keys]
        if len(mask) == 1:
            return mask[:, :, None]
        return mask[heads.reshape(-1)].unflatten(0, (kv_heads, -1)).transpose(1, 2)


def sequences(call: Call) -> Iterator[CallSequence]:
    """Each sequence of a call; lists of keys are part of its mask.

    Where there is a mask or a list, keys that no row sees are 0: what is not to be read may be NaN.
    """
    for sequence, listed in _raw(call):
        found = sequence
        if listed is not None:
            found = replace(found, mask=_with_list(found, listed))
        yield found if found.mask is None else _without_unseen(found)


def listed_rows(call: Call) -> Iterator[CallSequence]:
    """Each sequence of a call as a kernel goes through it: of rows that list their keys each by itself, with
    the keys that it lists, in the list's order."""
    for sequence, listed in _raw(call):
        if listed is None:
            yield sequence
            continue
        batch, rows = sequence.at
        for t, n in enumerate(sequence.n_kv):
            its = listed[t][listed[t] >= 0].long()
            row = slice(t, t + 1)
            # At least one key is held, even where none is seen.
            held = its if n else its.new_zeros(1)
            yield CallSequence(
                at=(batch, slice(rows.start + t, rows.start + t + 1)),
                q=sequence.q[row],
                k=sequence.k[held],
                v=sequence.v[held],
                kv_len=sequence.kv_len[row] if n else torch.zeros_like(sequence.kv_len[row]),
                lengths=sequence.lengths[row],
                n_kv=(n,),
                mask=None if sequence.mask is None else sequence.mask[:, row, held],
                positions=held,
            )


def _raw(call: Call) -> Iterator[tuple[CallSequence, torch.Tensor | None]]:
    """Each sequence, and the lists [T, K] of its rows, which are no part of its mask yet."""
    lengths = lengths_of(call.kv_len).of_rows
    counts = lengths if call.keys is None else tuple(call.n_kv.flatten().tolist())
    width = call.q.shape[1]
    for b, (batch, rows) in enumerate(call.rows_of_sequences()):
        own = slice(batch * width + rows.start, batch * width + rows.stop)
        if call.block_table is not None:
            longest = max(lengths[own], default=0)
            k, v = (_gathered(x, call.block_table[b], longest) for x in (call.k, call.v))
        elif call.k.shape[1]:
            k, v = call.k[b], call.v[b]
        else:
            k, v = (x.new_zeros((1, *x.shape[2:])) for x in (call.k, call.v))
        mask = call.mask
        if mask is not None:
            mask = mask[batch if len(mask) > 1 else 0][:, rows, : len(k)]
            # Where there are no keys there is one that nobody sees.
            mask = torch.nn.functional.pad(mask, (0, len(k) - mask.shape[-1]))
        sequence = CallSequence(
            at=(batch, rows),
            q=call.q[batch, rows],
            k=k,
            v=v,
            kv_len=call.kv_len[batch, rows],
            lengths=lengths[own],
            n_kv=counts[own],
            mask=mask,
        )
        yield sequence, None if call.keys is None else call.keys[batch, rows]


def _gathered(pages: torch.Tensor, table: torch.Tensor, longest: int) -> torch.Tensor:
    """Keys 0 .. longest-1 of one sequence, [S, H, D]; one key of 0 where it has none."""
    if not longest:
        return pages.new_zeros((1, *pages.shape[2:]))
    used = table[: -(-longest // pages.shape[1])].long()
    return pages[used].flatten(0, 1)[:longest]


def _with_list(sequence: CallSequence, listed: torch.Tensor) -> torch.Tensor:
    """The mask [Hq or 1, T, S] with what rows do not list hidden."""
    seen = torch.zeros((len(listed), len(sequence.k)), dtype=torch.bool, device=listed.device)
    row, place = (listed >= 0).nonzero(as_tuple=True)
    seen[row, listed[row, place].long()] = True
    if sequence.mask is None:
        return seen[None]
    if sequence.mask.dtype == torch.bool:
        return sequence.mask & seen
    return sequence.mask.masked_fill(~seen, -math.inf)


def _without_unseen(sequence: CallSequence) -> CallSequence:
    """The same with 0 in keys and values that no row sees."""
    mask = sequence.mask
    assert mask is not None
    seen = (mask if mask.dtype == torch.bool else ~torch.isneginf(mask)).flatten(0, 1).any(0)
    k, v = (torch.where(seen[:, None, None], x, 0.0) for x in (sequence.k, sequence.v))
    return replace(sequence, k=k, v=v)
