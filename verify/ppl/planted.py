"""Power: faults of graded size, planted in the baseline's own result, one pass with frozen casts each.

Whether a run would have seen a fault is answered by planting one. Each is what a real bug does, at sizes from
far below to far above what matters:

scale        every result times 1 + size: a wrong scale, a lost factor
last key     the newest key is not seen
middle key   the key in the middle of the visible range is not seen: a key at a cut
merge        two parts, keys below and from n_kv / 2; the second's weight is off by one unit in the last place
             of its log-sum-exp in float16

All are computed in float64 from the oracle's own result, so that a fault has exactly the size that it says.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from verify.kernels.call import AttentionOutput, Call
from verify.kernels.exact import exact_attention, finish_logits
from verify.ppl.measuring import Fault

PREFIX = "power/"
SCALES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
# A key that holds all the weight but this cannot be taken away: nothing would be left.
LEAST_REST = 1e-9
F16_DIGITS = 10


class PlantedFault(NamedTuple):
    """name: of its pass; kind: as above; size: of a scale error, else NaN."""

    name: str
    kind: str
    size: float
    fault: Fault


def planted_faults() -> list[PlantedFault]:
    """Every fault of `--power`."""
    scales = [PlantedFault(f"{PREFIX}scale {size:g}", "scale", size, _scale(size)) for size in SCALES]
    others: list[tuple[str, Fault]] = [
        ("last key", last_key_dropped),
        ("middle key", middle_key_dropped),
        ("merge", merge_weight_off),
    ]
    return scales + [PlantedFault(f"{PREFIX}{kind}", kind, math.nan, fault) for kind, fault in others]


def _scale(size: float) -> Fault:
    return lambda call, oracle, result: result * size


def last_key_dropped(call: Call, oracle: AttentionOutput, result: torch.Tensor) -> torch.Tensor:
    return _without_key(call, oracle, call.kv_len.long() - 1)


def middle_key_dropped(call: Call, oracle: AttentionOutput, result: torch.Tensor) -> torch.Tensor:
    return _without_key(call, oracle, call.kv_len.long() // 2)


def _without_key(call: Call, oracle: AttentionOutput, dropped: torch.Tensor) -> torch.Tensor:
    """What the result changes by where key dropped [B, T] is not seen: (o - p v) / (1 - p) - o, p its weight.

    That is p (o - v) / (1 - p).
    """
    shape = call.shape
    change = torch.zeros_like(oracle.out)
    for b in range(shape.batch):
        k, v = (
            x[b, dropped[b].clamp(min=0)].double().repeat_interleave(shape.ratio, 1) for x in (call.k, call.v)
        )  # [T, Hq, D]
        s = (call.q[b].double() * k).sum(-1) * call.scale  # [T, Hq]
        grouped = s.T.reshape(shape.kv_heads, shape.ratio, -1).transpose(1, 2)[..., None]
        # One key a row: its position is the row's own, so each row is masked by its distance to the newest.
        newest = call.kv_len[b].long() - dropped[b]
        s = finish_logits(grouped, newest, torch.zeros(1, dtype=torch.long, device=s.device), call)
        s = s[..., 0].transpose(1, 2).reshape(shape.q_heads, -1).T
        p = torch.exp(s - oracle.lse[b].clamp(min=-1e300))[..., None]
        rest = 1 - p
        change[b] = torch.where(rest > LEAST_REST, p * (oracle.out[b] - v) / rest.clamp(min=LEAST_REST), 0.0)
    return change


def merge_weight_off(call: Call, oracle: AttentionOutput, result: torch.Tensor) -> torch.Tensor:
    """With weights w and 1 - w of the two parts, and f the factor of the second:

    (w o1 + f (1 - w) o2) / (w + f (1 - w)) - o, where (1 - w) o2 = o - w o1. Nothing in layers with a window.
    """
    if call.sliding_window is not None:
        return torch.zeros_like(oracle.out)
    first = exact_attention(replace(call, kv_len=call.kv_len // 2))
    w = torch.exp(first.lse - oracle.lse.clamp(min=-1e300))
    rest = (1 - w).clamp(min=LEAST_REST)
    lse = oracle.lse + torch.log(rest)
    exponent = torch.frexp(lse).exponent - 1
    f = torch.exp(torch.ldexp(torch.ones_like(lse), (exponent - F16_DIGITS).clamp(min=-24)))[..., None]
    w, rest = w[..., None], rest[..., None]
    first_share = w * first.out
    changed = (first_share + f * (oracle.out - first_share)) / (w + f * rest)
    return torch.where(torch.isfinite(lse)[..., None] & (w > 0), changed - oracle.out, 0.0)
