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

# A share of the error, squared, that one key must explain before it is named.
EXPLAINED = 0.98


class RowWeights:
    """The exact weights and values of one row and head: p [n], v [n, Dv], float64, keys that it sees."""

    def __init__(self, call: Call, b: int, t: int, h: int) -> None:
        n, kv = int(call.kv_len[b, t]), h // call.shape.ratio
        k, self.v = (x[b, :n, kv].double() for x in (call.k, call.v))
        raw = call.scale * (k @ call.q[b, t, h].double())
        slopes = None if call.alibi_slopes is None else call.alibi_slopes[h : h + 1]
        positions, length = torch.arange(n, device=k.device), call.kv_len[b, t].long().view(1)
        one = replace(call, alibi_slopes=slopes)
        s = finish_logits(raw.view(1, 1, 1, n), length, positions, one).flatten()
        sink = s.new_tensor([-torch.inf]) if call.sinks is None else call.sinks[h : h + 1].double()
        self.p = torch.softmax(torch.cat((s, sink)), 0)[:-1]


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
    worst = 0.0
    lengths, ratio = call.kv_len.tolist(), call.shape.ratio
    for b in range(call.shape.batch):
        for t, n in enumerate(lengths[b]):
            if n < 2:
                continue
            v = call.v[b, :n].double().repeat_interleave(ratio, 1)  # [n, Hq, Dv]
            away = (v - due.out[b, t]).square().mean(0).sqrt()
            share = (due.bound[b, t] / away.clamp(min=1e-300)).amin(-1)
            share = share[~due.vacuous[b, t]]
            if share.numel():
                worst = max(worst, float((share / (1 + share)).max()))
    return worst
