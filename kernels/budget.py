"""The rounding-error bound (budget) of every output element of one call.

For one row and head, with s_j the logits, p = softmax(s), m = max s, l = sum_j exp(s_j - m) and
o = sum_j p_j v_j, all in float64, and the kernel's `Arithmetic` giving unit roundoffs u and depths d:

    S_j   = scale * sum_c |q_c k_jc|            what rounding of the product q.k is relative to
    eta_j = (gamma_D + u_q + u_k) S_j + 4u (|s_j| + |m|) + tiles * 3u
            + [parts > 1] (2u (|s_j| + |m|) + 4u ln n + 6u)
                                                bound of the relative error of exp(s_j - m), rescales included
    W     = sum_j p_j exp(-eta_j)
    r_j   = min(p_j, max(u_p p_j, tau_p / l)) exp(eta_j) / W       rounding of P to its type
    B_i   = (1/W) sum_j p_j expm1(eta_j) (|v_ji| + |o_i|) + sum_j r_j |v_ji|
            + (gamma_dn + gamma_dm + u_v + u_part) sum_j p_j |v_ji| + (gamma_dl + gamma_dm + 3u) |o_i|
    B'_i  = min(B_i, max_j |v_ji| + |o_i|)
    bound = B'_i + u_out (|o_i| + B'_i) + tau_out + n 2^-149

with gamma_d = d u / (1 - d u). The first term uses |v_ji - o_i| <= |v_ji| + |o_i|, which makes it a matrix
product. A sink is one more key whose value is 0; softcap multiplies eta by at most 1 and adds two roundings.
Sources: N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., ch. 3 (gamma_d); P. Blanchard,
D. Higham, N. Higham, Accurately computing the log-sum-exp and softmax functions, 2021 (the exponentials).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kernels.arithmetic import FLOAT_TYPES, Arithmetic
from kernels.contract import Call
from kernels.exact import exact_attention, finish_logits

# Where the bound is more than this share of sum_j p_j |v_j|, it says nothing: it is called vacuous.
VACUOUS = 1.0 / 8.0


class Budget(NamedTuple):
    """exact out [B, T, Hq, Dv] and lse [B, T, Hq] in float64, and their bounds.

    size: sum_j p_j |v_j|, what errors are relative to; vacuous [B, T, Hq]: the bound says nothing there.
    """

    out: torch.Tensor
    lse: torch.Tensor
    bound: torch.Tensor
    lse_bound: torch.Tensor
    size: torch.Tensor
    vacuous: torch.Tensor


def gamma(depth: torch.Tensor, u: float) -> torch.Tensor:
    """d u / (1 - d u), infinite from d u = 1."""
    du = depth * u
    return torch.where(du < 1, du / (1 - du).clamp(min=1e-300), torch.inf)


def error_budget(call: Call, arithmetic: Arithmetic) -> Budget:
    """The budget of a call for a kernel of this arithmetic. Holds B * T * Hq * S logits: sample the rows."""
    shape, heads, r = call.shape, call.shape.kv_heads, call.shape.ratio
    oracle = exact_attention(call)
    bound, size = torch.zeros_like(oracle.out), torch.zeros_like(oracle.out)
    lse_bound = torch.zeros_like(oracle.lse)
    for b in range(shape.batch):
        q = call.q[b].double().view(shape.rows, heads, r, -1).permute(1, 0, 2, 3)  # [Hkv, T, r, Dk]
        k = call.k[b].double().permute(1, 2, 0)  # [Hkv, Dk, S]
        v = call.v[b].double().permute(1, 0, 2)  # [Hkv, S, Dv]
        o = oracle.out[b].view(shape.rows, heads, r, -1).permute(1, 0, 2, 3)
        lse = oracle.lse[b].view(shape.rows, heads, r).permute(1, 0, 2)
        rows = shape.rows * r

        def products(a: torch.Tensor, x: torch.Tensor, rows: int = rows) -> torch.Tensor:
            return torch.bmm(a.reshape(heads, rows, -1), x).view(heads, shape.rows, r, -1)

        n_kv = call.kv_len[b]
        positions = torch.arange(shape.keys, device=q.device)
        s = finish_logits(products(q, k) * call.scale, n_kv, positions, call)
        big_s = products(q.abs(), k.abs()) * abs(call.scale)
        terms = _terms(s, big_s, lse, n_kv, shape.k_size, arithmetic)
        size_b = products(terms.p, v.abs())
        abs_o = o.abs()
        spread = products(terms.p * torch.expm1(terms.eta), v.abs())
        spread = (spread + (terms.p * torch.expm1(terms.eta)).sum(-1, keepdim=True) * abs_o) / terms.w
        total = spread + products(terms.rounded_p, v.abs())
        total = total + terms.numerator * size_b + terms.denominator * abs_o
        seen = torch.isfinite(s).to(v.dtype)  # [Hkv, T, r, S]
        largest = _largest_seen(seen, v)
        capped = torch.minimum(total.nan_to_num(posinf=torch.inf), largest + abs_o)
        out_type = FLOAT_TYPES[arithmetic.out]
        capped = capped + out_type.u * (abs_o + capped) + out_type.tau
        # The result is stored as float32 in any case.
        capped = capped + 2.0**-24 * abs_o + n_kv.view(1, -1, 1, 1) * 2.0**-149
        bound[b] = capped.permute(1, 0, 2, 3).reshape(shape.rows, heads * r, -1)
        size[b] = size_b.permute(1, 0, 2, 3).reshape(shape.rows, heads * r, -1)
        lse_bound[b] = terms.lse.permute(1, 0, 2).reshape(shape.rows, heads * r)
    vacuous = bound.amax(-1) > VACUOUS * size.amax(-1)
    return Budget(oracle.out, oracle.lse, bound, lse_bound, size, vacuous)


class _Terms(NamedTuple):
    """p, eta, rounded_p [Hkv, T, r, S]; w, numerator, denominator [Hkv, T, r, 1]; lse [Hkv, T, r]."""

    p: torch.Tensor
    eta: torch.Tensor
    rounded_p: torch.Tensor
    w: torch.Tensor
    numerator: torch.Tensor
    denominator: torch.Tensor
    lse: torch.Tensor


def _terms(
    s: torch.Tensor, big_s: torch.Tensor, lse: torch.Tensor, n_kv: torch.Tensor, k_size: int, a: Arithmetic
) -> _Terms:
    u = a.u
    u_acc = u if a.acc == "f32" else FLOAT_TYPES["f16"].u
    depths = [a.depths(int(n)) for n in n_kv]

    def per_row(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=s.device).view(1, -1, 1, 1)

    tiles = per_row([d.tiles for d in depths])
    split = per_row([int(d.parts > 1) for d in depths])
    gamma_l = gamma(per_row([d.d_l for d in depths]), u)
    gamma_n = gamma(per_row([d.d_n for d in depths]), u_acc)
    gamma_m = gamma(per_row([d.d_m for d in depths]), u)
    n = n_kv.view(1, -1, 1, 1).double().clamp(min=1)
    seen = torch.isfinite(s)
    lse4 = torch.where(torch.isneginf(lse), 0.0, lse)[..., None]
    p = torch.where(seen, torch.exp(s - lse4), 0.0)
    m = torch.where(seen, s, -torch.inf).amax(-1, keepdim=True)
    m = torch.where(torch.isneginf(m), 0.0, m)
    abs_s = torch.where(seen, s.abs(), 0.0)
    gamma_d = gamma(torch.tensor(float(k_size), dtype=torch.float64), u).item()
    eta = (gamma_d + a.u_q + a.u_k) * big_s + 4 * u * (abs_s + m.abs()) + tiles * 3 * u
    eta = eta + split * (2 * u * (abs_s + m.abs()) + 4 * u * torch.log(n) + 6 * u)
    eta = torch.where(seen, eta, 0.0)
    w = (p * torch.exp(-eta)).sum(-1, keepdim=True)
    w = torch.where(w > 0, w, 1.0)
    p_type = FLOAT_TYPES[a.p]
    l = torch.exp(lse4 - m)
    lost = torch.minimum(p, torch.maximum(p_type.u * p, p_type.tau / l * seen))
    rounded = lost * torch.exp(eta) / w
    in_denominator = p_type.u if a.l_from_rounded_p else 0.0
    mean_eta = (p * eta).sum(-1, keepdim=True)
    lse_bound = mean_eta + gamma_l + split * gamma_m + in_denominator
    lse_bound = lse_bound + 2 * u * (lse4.abs() + torch.log(n) + 1) + u * m.abs() + 2.0**-24 * lse4.abs()
    return _Terms(
        p,
        eta,
        rounded,
        w,
        gamma_n + gamma_m + a.u_v + a.u_part,
        gamma_l + gamma_m + 3 * u + in_denominator,
        lse_bound.squeeze(-1),
    )


def _largest_seen(seen: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """max_j |v_ji| over the keys that each row sees: [Hkv, T, 1, Dv]."""
    heads, rows, _, keys = seen.shape
    largest = v.new_zeros((heads, rows, 1, v.shape[-1]))
    # Rows see a range of keys; the running maximum over prefixes is an upper bound for any of them.
    prefix = v.abs().cummax(1).values
    last = (seen[:, :, 0] * torch.arange(1, keys + 1, device=v.device)).amax(-1).long()  # [Hkv, T]
    for h in range(heads):
        largest[h, :, 0] = torch.where(last[h, :, None] > 0, prefix[h][(last[h] - 1).clamp(min=0)], 0.0)
    return largest
