"""The rounding-error bound (budget) of every output element of one call, its expected size and quadrature.

For one row and head, with s_j the logits, p = softmax(s), m = max s, l = sum_j exp(s_j - m) and
o = sum_j p_j v_j, all in float64, and the kernel's `Arithmetic` giving unit roundoffs u and depths d:

    S_j   = scale * sum_c |q_c k_jc|            what rounding of the product q.k is relative to
    eta_j = ((1 + gamma_D)(1 + u_q)(1 + u_k) - 1) S_j + 4u (|s_j| + |m|) + tiles * 3u
            + [parts > 1] (2u (|s_j| + |m|) + 4u ln n + 6u)
                                                bound of the relative error of exp(s_j - m), rescales included
    W     = sum_j p_j exp(-eta_j)
    r_j   = min(p_j, max(u_p p_j, tau_p / l)) exp(eta_j) / W       rounding of P to its type
    A_i   = (1/W) sum_j p_j expm1(eta_j) (|v_ji| + |o_i|) + sum_j r_j |v_ji|
    B_i   = A_i + g_n (sum_j p_j |v_ji| + A_i) + g_l (|o_i| + A_i)
            g_n = gamma_dn + gamma_dm + u_v + u_part,  g_l = gamma_dl + gamma_dm + 3u
    B'_i  = min(B_i, max_j |v_ji| + |o_i|)
    bound = B'_i + (u_out + 2^-24) (|o_i| + B'_i) + tau_out + n 2^-149

with gamma_d = d u / (1 - d u). The first term uses |v_ji - o_i| <= |v_ji| + |o_i|, which makes it a matrix
product. A sink is one more key whose value is 0, merged as one more part. softcap multiplies the error of the
product by at most exp(2 error / c) (1 - (s_j / c)^2). `docs/numerics.md` derives every line.
Sources: N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., ch. 3 (gamma_d); P. Blanchard,
D. Higham, N. Higham, Accurately computing the log-sum-exp and softmax functions, 2021 (the exponentials);
N. Higham, T. Mary, A new approach to probabilistic rounding error analysis, 2019 (the quadrature).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.rows import BudgetRows
from verify.kernels.budget.sums import RoundedP, Sums
from verify.kernels.call import Call, Shape
from verify.kernels.lengths import lengths_of
from verify.kernels.rotation import block_mean_square, rotate, roundings, spread_bound
from verify.kernels.sequences import sequences

# Where the bound is more than this share of sum_j p_j |v_j|, it says nothing: it is called vacuous.
VACUOUS = 1.0 / 8.0
# Sums p|v| below this have less than float32's precision in float32: its smallest normal number, times 2^6.
SMALLEST_SIZE = 2.0**-120
# Logits held at once: so many rows are taken together. Their keys are taken in blocks: on a CPU of so many
# logits that what is made of them stays in its cache. Rules of shapes and device alone.
_LOGITS_AT_ONCE = 1 << 22
_LOGITS_AT_ONCE_CUDA = 1 << 24
_KEYS_AT_ONCE = 1 << 14
_LOGITS_A_BLOCK, _LEAST_KEYS_A_BLOCK = 1 << 16, 64


class Budget(NamedTuple):
    """What the errors of one call are measured against; everything in float64.

    Shapes: [B, T, Hq, Dv], and [B, T, Hq] where it says a row.
    """

    # The exact result, and its log-sum-exp a row.
    out: torch.Tensor
    lse: torch.Tensor  # log-sum-exp, a row
    # What no correct kernel of this arithmetic exceeds; the same for the lse a row.
    bound: torch.Tensor
    lse_bound: torch.Tensor  # of the lse, a row
    # sum_j p_j |v_j|: what errors are relative to.
    size: torch.Tensor
    # Whether the bound says nothing, a row.
    vacuous: torch.Tensor
    # Root mean square of the error of a correct kernel.
    expected: torch.Tensor
    # What of it float16 sums lose one way, since their steps are alike.
    stagnation: torch.Tensor
    # Root of the sum of squares of the single bounds.
    quadrature: torch.Tensor
    # What roundings of one direction may make of <err, out> / <out, out>, a row, as the arithmetic says;
    # infinite where results are so small that their type has few of them, and no gain can be told.
    bias: torch.Tensor
    # The same, downwards and upwards, with what an arithmetic may do that is only assumed.
    falls: torch.Tensor
    rises: torch.Tensor  # upwards


def error_budget(call: Call, arithmetic: Arithmetic) -> Budget:
    """The budget of a call for a kernel of this arithmetic: see `error_budgets`."""
    return error_budgets(call, [arithmetic])[0]


def error_budgets(call: Call, arithmetics: Sequence[Arithmetic]) -> list[Budget]:
    """The budget of a call for each of some kernels, streamed over rows and keys.

    What follows from the inputs alone is computed once, and kernels that round alike share one budget.
    Memory is a few blocks of logits beside the results, whatever n_kv is. Runs where the call's tensors lie.
    """
    if call.keys is None:
        lengths = sorted(set(lengths_of(call.kv_len).of_rows))
    else:
        lengths = call.n_kv.unique().tolist()
    keys = [rounding_key(a, lengths) for a in arithmetics]
    made: dict[Any, Budget] = {}
    by_rotation: dict[tuple[int, int], dict[Any, Arithmetic]] = {}
    for key, a in zip(keys, arithmetics, strict=True):
        by_rotation.setdefault((a.k_rotation, a.v_rotation), {})[key] = a
    for (k, v), different in by_rotation.items():
        found = _budgets(_rotated_call(call, k, v), list(different.values()))
        made |= zip(different, (_rotated_back(budget, v) for budget in found), strict=True)
    return [made[key] for key in keys]


def rounding_key(arithmetic: Arithmetic, lengths: Sequence[int]) -> Any:
    """Equal for two arithmetics whose budgets are equal at these n_kv."""
    return replace(arithmetic, cuts_at=None, block=None), tuple(arithmetic.depths(n) for n in lengths)


def _rotated_call(call: Call, k: int, v: int) -> Call:
    """The call in the coordinates in which a kernel over a rotated cache computes, in float64."""
    if not k and not v:
        return call
    turned = [rotate(x.double(), block) for x, block in ((call.q, k), (call.k, k), (call.v, v))]
    return replace(call, q=turned[0], k=turned[1], v=turned[2])


def _rotated_back(budget: Budget, block: int) -> Budget:
    """A budget in the coordinates of rotated values, in the caller's.

    An error e of the rotated result becomes H e, at most |H| |e|, and of its own size where the elements of e
    are independent; the rotations of v and of the result in float32 are charged to the norms of their blocks.
    Products along a head keep their values: gains are what they were.
    """
    if not block:
        return budget
    turned = 3 * roundings(block) * 2.0**-24
    rounded = turned * math.sqrt(block) * block_mean_square(budget.size + budget.bound, block)
    return budget._replace(
        out=rotate(budget.out, block),
        bound=spread_bound(budget.bound, block) + rounded,
        size=block_mean_square(budget.size, block),
        expected=(block_mean_square(budget.expected, block).square() + (rounded / 4).square()).sqrt(),
        stagnation=block_mean_square(budget.stagnation, block),
        quadrature=block_mean_square(budget.quadrature, block) + rounded,
    )


def _budgets(call: Call, arithmetics: Sequence[Arithmetic]) -> list[Budget]:
    shape, like = call.shape, call.q
    wide, narrow = (*like.shape[:3], shape.v_size), like.shape[:3]
    out, size = (like.new_zeros(wide, dtype=torch.float64) for _ in range(2))
    lse = like.new_full(narrow, -math.inf, dtype=torch.float64)
    budgets = [
        Budget(
            out=out, lse=lse,
            bound=torch.zeros_like(out), lse_bound=torch.full_like(lse, -math.inf), size=size,
            vacuous=torch.zeros(narrow, dtype=torch.bool, device=like.device),
            expected=torch.zeros_like(out), stagnation=torch.zeros_like(out),
            quadrature=torch.zeros_like(out),
            bias=torch.zeros_like(lse), falls=torch.zeros_like(lse), rises=torch.zeros_like(lse),
        )
        for _ in arithmetics
    ]  # fmt: skip
    logits_at_once = _LOGITS_AT_ONCE_CUDA if like.is_cuda else _LOGITS_AT_ONCE
    at_once = max(logits_at_once // (shape.q_heads * max(min(shape.keys, _KEYS_AT_ONCE), 1)), 1)
    for sequence in sequences(call):
        # Rows of like n_kv together, so that a block of rows reads no more keys than it needs.
        order = sorted(range(len(sequence.lengths)), key=sequence.lengths.__getitem__)
        b, own = sequence.at
        for first in range(0, len(order), at_once):
            its = order[first : first + at_once]
            rows = BudgetRows(call, sequence, its)
            chosen = rows.rows + own.start
            weights = {RoundedP.kind(a): RoundedP(rows, a) for a in arithmetics}
            sums = [Sums(rows, a, weights[RoundedP.kind(a)]) for a in arithmetics]
            for block in rows.blocks(_keys_at_once(len(its), shape, on_gpu=like.is_cuda)):
                for each_kind in weights.values():
                    each_kind.add(block)
                for each in sums:
                    each.add(block)
            for whole, part in ((out, rows.out), (size, rows.size), (lse, rows.lse.squeeze(-1))):
                whole[b, chosen] = _by_row(part)
            for budget, each in zip(budgets, sums, strict=True):
                bound, lse_bound = each.bounds()
                expected, stagnation = each.expected(), each.stagnation()
                quadrature = each.quadrature(bound)
                bias, falls, rises = each.bias()
                for whole, part in (
                    (budget.bound, bound), (budget.lse_bound, lse_bound),
                    (budget.expected, expected), (budget.stagnation, stagnation),
                    (budget.quadrature, quadrature),
                    (budget.bias, bias), (budget.falls, falls), (budget.rises, rises),
                ):  # fmt: skip
                    whole[b, chosen] = _by_row(part)
    for budget in budgets:
        budget.vacuous.copy_(budget.bound.amax(-1) > VACUOUS * size.amax(-1))
    return budgets


def _keys_at_once(rows: int, shape: Shape, *, on_gpu: bool) -> int:
    """Keys a block of so many rows."""
    if on_gpu:
        return _KEYS_AT_ONCE
    keys = _LOGITS_A_BLOCK // max(rows * shape.q_heads, 1)
    return min(max(keys, _LEAST_KEYS_A_BLOCK), _KEYS_AT_ONCE)


def _by_row(x: torch.Tensor) -> torch.Tensor:
    """[Hkv, t, r, ...] as [t, Hq, ...]."""
    return x.transpose(0, 1).flatten(1, 2)
