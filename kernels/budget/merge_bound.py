"""What a merge of parts may err by, from what its parts err by: composes over any tree of merges.

Part i is (o_i, L_i), known to b_i and lambda_i; M = max L_i, w_i = exp(L_i - M), W = sum_i w_i, P parts. The
maximum is common to all weights and cancels, so the computed weight of a part is w_i (1 + e_i) up to a common
factor, with

    |e_i| <= expm1(eta_i)      eta_i = lambda_i + 2u (|L_i| + |M|) + 6u

(the subtraction, the change of base inside the exponential, the exponential itself), or it is lost whole
below tau = 2^-126. Because sum_i w_i (o_i - o) = 0,

    |err o| <= [sum_i w_i expm1(eta_i) |o_i - o| + sum_i w_i e^eta_i b_i] / sum_i w_i e^-eta_i
               + gamma_(2P + 4) [sum_i w_i e^eta_i (|o_i| + b_i)] / sum_i w_i e^-eta_i
               + P (tau max |o_i| + 2^-149)
    |err L| <= max(ln(1 + sum_i w_i expm1(eta_i) / W), -ln(sum_i w_i e^-eta_i / W)) + gamma_(P + 2)
               + 4u ln P + 2u |L|

A result that is rounded to 16 bits has u_out (|o| + err) + tau_out more. Both sums pass P additions, a
product and a division; ln P bounds the logarithm. A merge that all parts leave empty is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from verify.kernels.budget.sums import gamma
from verify.kernels.merge import Part
from verify.kernels.numbers import EXP_UNDERFLOW, FLOAT_TYPES, U_F32


class BoundedPart(NamedTuple):
    """out [..., D], lse [...]: the exact part, in float64; bound, lse_bound: what it is known to."""

    out: torch.Tensor
    lse: torch.Tensor
    bound: torch.Tensor
    lse_bound: torch.Tensor


def given(part: Part) -> BoundedPart:
    """A part that is exact as it stands."""
    out, lse = part.out.double(), part.lse.double()
    return BoundedPart(out, lse, torch.zeros_like(out), torch.zeros_like(lse))


def merge_bound(
    parts: Sequence[BoundedPart], u: float = U_F32, kind: str = "f32", *, of_lse: bool = False
) -> BoundedPart:
    """The exact merge of the exact parts, and what one computed merge of computed parts errs by at most.

    u: unit roundoff of the merge; kind: type that its output is rounded to; of_lse: weights may be
    exp(L_i - L), so that what L errs by is common to them and does not cancel. Raises ValueError on no part.
    """
    if not parts:
        raise ValueError("parts: expected at least one part")
    count = len(parts)
    out = torch.stack([p.out for p in parts])  # [P, ..., D]
    lse = torch.stack([p.lse for p in parts])  # [P, ...]
    known = torch.stack([p.bound for p in parts])
    lse_known = torch.stack([p.lse_bound for p in parts])
    top = lse.amax(0)
    empty = torch.isneginf(top)
    shift = torch.where(empty, 0.0, top)
    w = torch.exp(lse - shift)
    total = w.sum(0)
    safe = torch.where(empty, 1.0, total)
    merged = (w[..., None] * out).sum(0) / safe[..., None]
    log = torch.where(empty, -math.inf, shift + torch.log(safe))

    size = torch.where(torch.isneginf(lse), 0.0, lse).abs() + shift.abs()
    eta = torch.where(torch.isneginf(lse), 0.0, lse_known + 2 * u * size + 6 * u)
    spread = w * torch.expm1(eta)
    up, low = w * torch.exp(eta), torch.where(empty, 1.0, (w * torch.exp(-eta)).sum(0))
    error = (spread[..., None] * (out - merged).abs() + up[..., None] * known).sum(0) / low[..., None]
    weighed = (up[..., None] * (out.abs() + known)).sum(0) / low[..., None]
    error = error + gamma(2 * count + 4, u) * weighed
    error = error + count * (EXP_UNDERFLOW * out.abs().amax(0) + 2.0**-149)
    lse_error = torch.maximum(torch.log1p(spread.sum(0) / safe), -torch.log(low / safe))
    lse_error = lse_error + gamma(count + 2, u) + 4 * u * math.log(count)
    lse_error = lse_error + 2 * u * torch.where(empty, 0.0, log).abs()
    if of_lse:
        error = error + torch.expm1(lse_error)[..., None] * (merged.abs() + error)
    if kind != "f32":
        error = error + FLOAT_TYPES[kind].u * (merged.abs() + error) + FLOAT_TYPES[kind].tau
    return BoundedPart(
        merged,
        log,
        torch.where(empty[..., None], 0.0, error),
        torch.where(empty, 0.0, lse_error),
    )
