"""Which key a wrong row is wrong about: the error of one row, held against what single keys can do to it.

A key j that is not seen moves the result by -p_j / (1 - p_j) (v_j - o), one that is seen twice by
p_j / (1 + p_j) (v_j - o). All weights are exact.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from verify.kernels.budget.bound import Budget
from verify.kernels.call import Call
from verify.kernels.exact import finish_logits
from verify.kernels.sequences import CallSequence, sequences

# A share of the error, squared, that one key must explain before it is named.
EXPLAINED = 0.98


class RowWeights:
    """The exact weights and values of one row and head: p [n], v [n, Dv], float64, the n keys below its
    kv_len; those that a mask or a list hides have no weight."""

    def __init__(self, call: Call, b: int, t: int, h: int) -> None:
        sequence, row = _sequence_of(call, b, t)
        n, kv = sequence.lengths[row], h // call.shape.ratio
        k, self.v = (x[:n, kv].double() for x in (sequence.k, sequence.v))
        raw = call.scale * (k @ call.q[b, t, h].double())
        slopes = None if call.alibi_slopes is None else call.alibi_slopes[h : h + 1]
        positions, length = torch.arange(n, device=k.device), call.kv_len[b, t].long().view(1)
        mask = sequence.mask
        if mask is not None:
            mask = mask[h if len(mask) > 1 else 0, row, :n]
        one = replace(call, alibi_slopes=slopes)
        s = finish_logits(raw.view(1, 1, 1, n), length, positions, one, mask).flatten()
        sink = s.new_tensor([-torch.inf]) if call.sinks is None else call.sinks[h : h + 1].double()
        self.p = torch.softmax(torch.cat((s, sink)), 0)[:-1]


def _sequence_of(call: Call, b: int, t: int) -> tuple[CallSequence, int]:
    """The sequence that row t of q[b] is of, and its place there."""
    for sequence in sequences(call):
        batch, rows = sequence.at
        if batch == b and rows.start <= t < rows.stop:
            return sequence, t - rows.start
    raise IndexError(f"row {t} of {b}")


def key_to_blame(call: Call, b: int, t: int, h: int, got: torch.Tensor, exact: torch.Tensor) -> str | None:
    """What one key explains of a row's error, as a sentence, or None where no key alone does.

    got, exact: [Dv].
    """
    error = got.double() - exact.double()
    if int(call.kv_len[b, t]) < 2 or not bool(torch.isfinite(error).all()):
        return None
    row = RowWeights(call, b, t, h)
    size = float(error.square().sum())
    if size == 0:
        return None
    away = row.v - exact
    lost = -(row.p / (1 - row.p).clamp(min=1e-300))[:, None] * away
    twice = (row.p / (1 + row.p))[:, None] * away
    for moved, words in ((lost, "were not seen"), (twice, "counted twice")):
        left = (error - moved).square().sum(-1) / size
        key = int(left.argmin())
        if float(left[key]) < 1 - EXPLAINED and float(row.p[key]) > 0:
            return f"as if key {key} {words}: it has {float(row.p[key]):.3g} of the row's weight"
    return f"heaviest key of that row: {int(row.p.argmax())}, {float(row.p.max()):.3g} of its weight"


def smallest_weight(call: Call, due: Budget) -> float:
    """The weight from which on a lost key shows in every row that has a budget: the largest over rows.

    A lost key moves element i by p / (1 - p) |v_ji - o_i|, taken at the root mean square of v_i - o_i over
    keys, in the element that tells best.
    """
    worst, ratio = 0.0, call.shape.ratio
    for sequence in sequences(call):
        b, rows = sequence.at
        seen = None if sequence.mask is None else _seen(sequence.mask)
        for t, n in enumerate(sequence.lengths):
            its = slice(0, n) if seen is None else seen[t, :n].nonzero().flatten()
            v = sequence.v[its].double()
            if len(v) < 2:
                continue
            at = b, rows.start + t
            away = (v.repeat_interleave(ratio, 1) - due.out[at]).square().mean(0).sqrt()
            share = (due.bound[at] / away.clamp(min=1e-300)).amin(-1)
            share = share[~due.vacuous[at]]
            if share.numel():
                worst = max(worst, float((share / (1 + share)).max()))
    return worst


def _seen(mask: torch.Tensor) -> torch.Tensor:
    """[T, S]: keys that a mask [H, T, S] leaves to some head."""
    return (mask if mask.dtype == torch.bool else ~torch.isneginf(mask)).any(0)
