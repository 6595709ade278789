"""What keys hold that no row sees: a likely key of value `POISON`, or numbers that a kernel need not bear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from verify.kernels.call import Call
from verify.kernels.lengths import unseen_keys

# Finite in float16, so that a zero weight hides it; NaN would show in kernels that are right (0 * NaN).
POISON = 6e4


class HeldUnseen(NamedTuple):
    """What keys hold that no row sees, of a kind of inputs that asks whether it reaches the result."""

    numbers: tuple[float, ...]  # in turns
    what: str  # that is, in words
    promise: str  # why a kernel whose result shows it may be right all the same


def likeliest(q: torch.Tensor, k: torch.Tensor, lengths: Sequence[Sequence[int]]) -> torch.Tensor:
    """For each sequence and KV head the key that its longest row's queries like best.

    q [B, T, Hkv, r, D], k [B, S, Hkv, D] -> [B, Hkv, D], where k lies. lengths: of each sequence's rows;
    zeros where one sees no key.

    A hidden key that is a copy of it is worth seeing for a kernel that forgets to hide it, and its logit is
    one of the call's: no mask that adds a finite number is overcome by it.
    """
    found = torch.zeros_like(k[:, 0])
    for b, rows in enumerate(lengths):
        if not (n := max(rows)):
            continue
        row = q[b, list(rows).index(n)].to(k.device)
        for h in range(k.shape[2]):
            keys = k[b, :n, h]
            few = (keys.float() @ row[h].float().T).amax(1).topk(min(n, 8)).indices.sort().values
            # Of those nearly alike every device finds the same in float64.
            found[b, h] = keys[few[(keys[few].double() @ row[h].double().T).amax(1).argmax()]]
    return found


def with_hidden(call: Call, held: Sequence[float]) -> Call:
    """The call whose keys that no row of their sequence sees hold these numbers in turns, and their values
    the same the other way round: beyond the longest row, and before the window of the shortest."""
    k, v = call.k.clone(), call.v.clone()
    numbers = torch.tensor(held, dtype=k.dtype, device=k.device)
    for b, rows in enumerate(call.kv_len.tolist()):
        for unseen in unseen_keys(rows, call.shape.keys, call.sliding_window):
            count = k[b, unseen].shape[0]
            bad = numbers.repeat(count // len(held) + 1)[:count].view(-1, 1, 1)
            k[b, unseen], v[b, unseen] = bad, bad.flip(0)
    return replace(call, k=k, v=v)
