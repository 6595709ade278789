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
from typing import NamedTuple

import torch

from kernels.arithmetic import FLOAT_TYPES, U_F32, Arithmetic, Depths
from kernels.cache import q8_0_error
from kernels.contract import Call
from kernels.exact import finish_logits

# Where the bound is more than this share of sum_j p_j |v_j|, it says nothing: it is called vacuous.
VACUOUS = 1.0 / 8.0
# Mean square of the relative rounding error, in units of u^2, of numbers whose mantissas are distributed
# logarithmically: (1/3) E[1/x^2] over [1, 2) with density 1/(x ln 2).
MEAN_SQUARE = (3.0 / 8.0) / (3.0 * math.log(2.0))
# Logits held at once: rows and keys are taken in blocks of this many. A rule of the shapes alone.
_LOGITS_AT_ONCE = 1 << 20
_KEYS_AT_ONCE = 1 << 14


class Budget(NamedTuple):
    """What the errors of one call are measured against; everything in float64.

    out [B, T, Hq, Dv], lse [B, T, Hq]: the exact result; bound, lse_bound: what no correct kernel of this
    arithmetic exceeds; size [B, T, Hq, Dv]: sum_j p_j |v_j|, what errors are relative to; vacuous
    [B, T, Hq]: the bound says nothing there; expected [B, T, Hq, Dv]: root mean square of the error of a
    correct kernel; quadrature [B, T, Hq, Dv]: root of the sum of squares of the single bounds.
    """

    out: torch.Tensor
    lse: torch.Tensor
    bound: torch.Tensor
    lse_bound: torch.Tensor
    size: torch.Tensor
    vacuous: torch.Tensor
    expected: torch.Tensor
    quadrature: torch.Tensor


def gamma(depth: torch.Tensor, u: float) -> torch.Tensor:
    """d u / (1 - d u), infinite from d u = 1."""
    du = depth * u
    return torch.where(du < 1, du / (1 - du).clamp(min=1e-300), torch.inf)


def error_budget(call: Call, arithmetic: Arithmetic) -> Budget:
    """The budget of a call for a kernel of this arithmetic, streamed over rows and keys.

    Memory is a few blocks of logits beside the results, whatever n_kv is. Runs where the call's tensors lie.
    """
    shape = call.shape
    if shape.keys == 0:
        raise ValueError("k: expected at least one key in S, got 0 (an empty row is kv_len = 0)")
    wide = [call.q.new_zeros((*call.q.shape[:3], shape.v_size), dtype=torch.float64) for _ in range(5)]
    narrow = [call.q.new_full(call.q.shape[:3], -math.inf, dtype=torch.float64) for _ in range(2)]
    keys = min(shape.keys, _KEYS_AT_ONCE)
    at_once = max(_LOGITS_AT_ONCE // (shape.q_heads * keys), 1)
    for b in range(shape.batch):
        # Rows of like n_kv together, so that a block of rows reads no more keys than it needs.
        order = call.kv_len[b].argsort()
        for first in range(0, shape.rows, at_once):
            rows = order[first : first + at_once]
            result = _Rows(call, arithmetic, b, rows).budget()
            for whole, part in zip(wide, result[:5], strict=True):
                whole[b, rows] = part.permute(1, 0, 2, 3).flatten(1, 2)
            for whole, part in zip(narrow, result[5:], strict=True):
                whole[b, rows] = part.permute(1, 0, 2).flatten(1, 2)
    out, bound, size, expected, quadrature = wide
    lse, lse_bound = narrow
    vacuous = bound.amax(-1) > VACUOUS * size.amax(-1)
    return Budget(out, lse, bound, lse_bound, size, vacuous, expected, quadrature)


def budget_ratio(error: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """|error| / bound, where 0 / 0 is 0, and a NaN or an Inf is infinitely wrong."""
    error = error.abs()
    ratio = torch.where(error == 0, 0.0, error / bound)
    return ratio.nan_to_num(nan=math.inf, posinf=math.inf)


class _Variances(NamedTuple):
    """[Hkv, t, r, n] in units of MEAN_SQUARE: of exp's relative error times p^2, and of P's rounding."""

    spread: torch.Tensor
    rounded: torch.Tensor


class _Rows:
    """Some rows [t] of one sequence. Sums over keys have shapes [Hkv, t, r, 1] and [Hkv, t, r, Dv]."""

    def __init__(self, call: Call, arithmetic: Arithmetic, b: int, rows: torch.Tensor) -> None:
        self.call, self.a, self.b = call, arithmetic, b
        shape = call.shape
        self.heads, self.r = shape.kv_heads, shape.ratio
        self.q = call.q[b, rows].double().view(len(rows), self.heads, self.r, -1).permute(1, 0, 2, 3)
        self.n_kv = call.kv_len[b, rows].long()
        self.sink: torch.Tensor | None = None
        if call.sinks is not None:
            self.sink = call.sinks.double().view(self.heads, 1, self.r, 1)
        depths = [arithmetic.depths(int(n)) for n in self.n_kv]
        self.tiles = self._per_row([d.tiles for d in depths])
        self.split = self._per_row([d.parts > 1 or self.sink is not None for d in depths])
        self.depths = depths
        last, first = int(self.n_kv.max()), 0
        if call.sliding_window is not None:
            first = max(int(self.n_kv.min()) - call.sliding_window, 0)
        self.blocks = [
            slice(start, min(start + _KEYS_AT_ONCE, last)) for start in range(first, last, _KEYS_AT_ONCE)
        ]

    def _per_row(self, values: list[int] | list[bool]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.q.device).view(1, -1, 1, 1)

    def _depth(self, name: str) -> torch.Tensor:
        return self._per_row([_depth(d, name, self.sink is not None) for d in self.depths])

    def _products(self, a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[Hkv, t, r, n] times [Hkv, n, m]."""
        heads, t, r, n = a.shape
        return torch.bmm(a.reshape(heads, t * r, n), x).view(heads, t, r, -1)

    def _logits(self, keys: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """s and big_s [Hkv, t, r, n] of a block of keys, and the keys themselves [Hkv, Dk, n]."""
        k = self.call.k[self.b, keys].double().permute(1, 2, 0)
        raw = self._products(self.q, k).mul_(self.call.scale)
        positions = torch.arange(keys.start, keys.stop, device=self.q.device)
        return finish_logits(raw, self.n_kv, positions, self.call), raw, k

    def _normaliser(self) -> None:
        """m, top, lse, l: the largest logit, with the sink, the log of the sum, the sum relative to top."""
        shape = (self.heads, len(self.n_kv), self.r, 1)
        m = self.q.new_full(shape, -math.inf)
        total = self.q.new_zeros(shape)
        for keys in self.blocks:
            s, _, _ = self._logits(keys)
            new = torch.maximum(m, s.amax(-1, keepdim=True))
            shift = torch.where(torch.isneginf(new), 0.0, new)
            total = total * torch.exp(m - shift) + torch.exp(s - shift).sum(-1, keepdim=True)
            m = new
        top = m if self.sink is None else torch.maximum(m, self.sink.expand(shape))
        shift = torch.where(torch.isneginf(top), 0.0, top)
        total = total * torch.exp(m - shift)
        if self.sink is not None:
            total = total + torch.exp(self.sink - shift)
        self.empty = total == 0
        self.l = torch.where(self.empty, 1.0, total)
        self.lse = torch.where(self.empty, -math.inf, shift + torch.log(self.l))
        self.largest = torch.where(torch.isneginf(m), 0.0, m).abs()
        if self.sink is not None:
            self.largest = torch.maximum(self.largest, self.sink.abs())
        self.top = shift

    def budget(self) -> tuple[torch.Tensor, ...]:
        """out, bound, size, expected, quadrature [Hkv, t, r, Dv]; lse and its bound [Hkv, t, r]."""
        self._normaliser()
        a, u = self.a, self.a.u
        n = self.n_kv.view(1, -1, 1, 1).double()
        log_n = torch.log(n.clamp(min=1) + (self.sink is not None))
        zeros = self.q.new_zeros((self.heads, len(self.n_kv), self.r, self.call.shape.v_size))
        zero = zeros[..., :1]
        # Sums over keys: of |v| times p, spread, rounded, p S; of v^2 times the variances; alone.
        out, moment = zeros.clone(), zeros.clone()
        by_abs = [zeros.clone() for _ in range(4)]
        by_square = [zeros.clone() for _ in range(4)]
        alone = [zero.clone() for _ in range(8)]
        cap = zeros.clone()
        for keys in self.blocks:
            s, raw, k = self._logits(keys)
            big_s = self._products(self.q.abs(), k.abs()).mul_(abs(self.call.scale))
            v = self.call.v[self.b, keys].double().permute(1, 0, 2)  # [Hkv, n, Dv]
            v = self._without_unseen(v, keys)
            seen = torch.isfinite(s)
            abs_s = torch.where(seen, s.abs(), 0.0)
            p = torch.where(seen, torch.exp(s - torch.where(self.empty, 0.0, self.lse)), 0.0)
            underflow = self._underflow(k)
            eta = self._eta(abs_s, raw, big_s, underflow, keys, log_n)
            spread = p * torch.expm1(eta)
            # eta is beside the point, and may be NaN, where a row does not see.
            shared = torch.where(seen, a.u_q * big_s + underflow, 0.0)
            big_s, eta = torch.where(seen, big_s, 0.0), torch.where(seen, eta, 0.0)
            lost = torch.minimum(p, torch.maximum(FLOAT_TYPES[a.p].u * p, a.tau_p / self.l))
            rounded = lost * torch.exp(eta)
            variances = self._variances(p, abs_s, big_s, s)
            abs_v, square_v = v.abs(), v.square()
            weights = torch.cat((p, spread, rounded, p * shared), dim=2)
            for total, more in zip(by_abs, self._products(weights, abs_v).chunk(4, dim=2), strict=True):
                total += more
            weights = torch.cat(
                (variances.spread, variances.rounded, p.square(), spread.square() + rounded.square()), dim=2
            )
            for total, more in zip(by_square, self._products(weights, square_v).chunk(4, dim=2), strict=True):
                total += more
            both = self._products(torch.cat((p, variances.spread), dim=2), v).chunk(2, dim=2)
            out += both[0]
            moment += both[1]
            sums = (p * torch.exp(-eta), spread, rounded, p * shared, variances.spread, variances.rounded,
                    spread.square(), rounded.square())  # fmt: skip
            for total, more in zip(alone, sums, strict=True):
                total += more.sum(-1, keepdim=True)
            cap = torch.maximum(cap, self._largest_seen(abs_v, keys))
        size, spread_v, rounded_v, q_v = by_abs
        w, spread_1, rounded_1, q_1, variance_1, rounded_variance_1, spread_square_1, rounded_square_1 = alone
        if self.sink is not None:
            p_sink = torch.where(self.empty, 0.0, torch.exp(self.sink - self.lse))
            eta_sink = self._exponent_error(self.sink.abs(), log_n)
            w = w + p_sink * torch.exp(-eta_sink)
            spread_1 = spread_1 + p_sink * torch.expm1(eta_sink)
            spread_square_1 = spread_square_1 + (p_sink * torch.expm1(eta_sink)).square()
        w = torch.where(w > 0, w, 1.0)
        abs_o = out.abs()
        from_rounded = float(a.l_from_rounded_p)
        first = (spread_v + spread_1 * abs_o + rounded_v + from_rounded * rounded_1 * abs_o) / w
        gamma_m, gamma_l = gamma(self._depth("d_m"), u), gamma(self._depth("d_l"), u)
        gamma_n = gamma(self._depth("d_n"), a.u_acc)
        total = first + (gamma_n + gamma_m + a.u_v + a.u_part) * (size + first)
        total = total + (gamma_l + gamma_m + 3 * u) * (abs_o + first)
        tau = FLOAT_TYPES["f16"].tau
        if a.acc == "f16":
            # Every rounding of a float16 accumulator may also underflow, in units of exp(s - m).
            total = total + self._depth("d_n") * tau / self.l
        total = total + tau * ((a.u_v > 0) + (a.u_part > 0))
        total = torch.minimum(total.nan_to_num(nan=math.inf, posinf=math.inf), cap + abs_o)
        out_type = FLOAT_TYPES[a.out]
        bound = total + (out_type.u + U_F32) * (abs_o + total) + out_type.tau + n * 2.0**-149

        lse_bound = torch.maximum(torch.log1p(spread_1), -torch.log(w.clamp(min=1e-300)))
        lse_bound = lse_bound + gamma_l + self.split * gamma_m + from_rounded * rounded_1 / w
        abs_lse = torch.where(self.empty, 0.0, self.lse).abs()
        lse_bound = lse_bound + 2 * u * (abs_lse + log_n + 1) + u * self.largest + U_F32 * abs_lse

        variance = MEAN_SQUARE * self._expected_variance(
            by_square, moment, variance_1, rounded_variance_1, out, size, (q_v + q_1 * abs_o)
        )
        expected = (variance + _step(out, a.out).square() / 12).sqrt()
        quadrature = (
            by_square[3] / w.square()
            + (spread_square_1 + from_rounded * rounded_square_1) * out.square() / w.square()
            + (a.u_acc**2 * self._depth("d_n") + (a.u_v + a.u_part) ** 2) * size.square()
            + u**2 * (self._depth("d_l") + 2 * self._depth("d_m") + 9) * (size.square() + out.square())
            # What all keys of a tile or part share cannot be added in squares over keys.
            + (3 * u) ** 2 * self.tiles * (size + abs_o).square()
            + (q_v + q_1 * abs_o).square()
            + (out_type.u + U_F32) ** 2 * out.square()
            + (a.acc == "f16") * self._depth("d_n") * (tau / self.l) ** 2
            + (out_type.tau + tau * ((a.u_v > 0) + (a.u_part > 0))) ** 2
        ).sqrt()
        quadrature = torch.minimum(quadrature, bound)
        return out, bound, size, expected, quadrature, self.lse.squeeze(-1), lse_bound.squeeze(-1)

    def _exponent_error(self, abs_s: torch.Tensor, log_n: torch.Tensor) -> torch.Tensor:
        """eta of a logit that is given, not computed."""
        u = self.a.u
        sum_of_logits = abs_s + self.largest
        eta = 4 * u * sum_of_logits + self.tiles * 3 * u
        return eta + self.split * (2 * u * sum_of_logits + 4 * u * log_n + 6 * u)

    def _underflow(self, k: torch.Tensor) -> torch.Tensor:
        """Error of the logits where q or k underflow in a cast, or q becomes blocks: [Hkv, t, r, n]."""
        a, tau, scale = self.a, FLOAT_TYPES["f16"].tau, abs(self.call.scale)
        error = self.q.new_zeros((1, 1, 1, 1))
        if a.u_q:
            # The scale may be multiplied in before the cast or after it.
            error = error + tau * max(scale, 1.0) * k.abs().sum(1)[:, None, None]
        if a.u_k:
            error = error + tau * scale * self.q.abs().sum(-1, keepdim=True)
        if a.q_blocks:
            error = error + scale * self._products(q8_0_error(self.q), k.abs())
        return error

    def _eta(
        self,
        abs_s: torch.Tensor,
        raw: torch.Tensor,
        big_s: torch.Tensor,
        underflow: torch.Tensor,
        keys: slice,
        log_n: torch.Tensor,
    ) -> torch.Tensor:
        a, u, cap = self.a, self.a.u, self.call.softcap
        depth = self.call.shape.k_size
        relative = (1 + depth * u / (1 - depth * u)) * (1 + a.u_q) * (1 + a.u_k) - 1
        product = relative * big_s + underflow
        if cap is not None:
            tanh = torch.tanh(raw / cap)
            product = product * (1 - tanh.square()) * torch.exp(2 * product / cap)
            product = product + (4 * u + a.u_tanh) * cap * tanh.abs()
        if self.call.alibi_slopes is not None:
            slopes = self.call.alibi_slopes.double().view(self.heads, 1, self.r, 1).abs()
            positions = torch.arange(keys.start, keys.stop, device=abs_s.device)
            distance = (self.n_kv.view(1, -1, 1, 1) - 1 - positions).clamp(min=0)
            # The unbiased logit and the bias may each be larger than their sum.
            product = product + 4 * u * slopes * distance
        return product + self._exponent_error(abs_s, log_n)

    def _variances(
        self, p: torch.Tensor, abs_s: torch.Tensor, big_s: torch.Tensor, s: torch.Tensor
    ) -> _Variances:
        a, u = self.a, self.a.u
        m = self.largest
        relative = u**2 * (big_s.square() / 2 + 4 * abs_s.square() + 4 * m.square() + 4)
        relative = relative + a.u_k**2 * big_s.square() / 2
        if self.call.softcap is not None:
            relative = relative + a.u_tanh**2 * abs_s.square()
        u_p, tau = FLOAT_TYPES[a.p].u, a.tau_p / self.l
        rounded = (u_p * p).square()
        # An error that is uniform within +-tau has the mean square tau^2 / 3; nobody loses more than p.
        below = torch.minimum(p.square(), (tau**2 / 3).expand_as(p)) / MEAN_SQUARE
        rounded = torch.where(u_p * p < tau, below, rounded)
        # exp(0) = 1 is exact in every type.
        exact = (p == 0) if a.stale_maximum else (p == 0) | (s == self.top)
        rounded = torch.where(exact, 0.0, rounded)
        return _Variances(p.square() * relative, rounded)

    def _expected_variance(
        self,
        by_square: list[torch.Tensor],
        moment: torch.Tensor,
        variance_1: torch.Tensor,
        rounded_variance_1: torch.Tensor,
        out: torch.Tensor,
        size: torch.Tensor,
        common: torch.Tensor,
    ) -> torch.Tensor:
        """Variance of the error, in units of MEAN_SQUARE, the rounding of the result left aside."""
        a, u = self.a, self.a.u
        spread_vv, rounded_vv, p_square_vv, _ = by_square
        square_o = out.square()
        # sum_j c_j (v_j - o)^2, multiplied out.
        variance = (spread_vv - 2 * out * moment + variance_1 * square_o).clamp(min=0)
        variance = variance + rounded_vv + a.l_from_rounded_p * rounded_variance_1 * square_o
        d_n, d_l = self._depth("d_n"), self._depth("d_l")
        variance = variance + u**2 * d_l * (p_square_vv + square_o)
        if a.acc == "f16":
            # Partial sums grow from nothing to o: like t where signs agree, like sqrt(t) where they do not.
            steps = a.u_acc**2 * d_n * (square_o / 3 + p_square_vv / 2)
            variance = variance + steps + d_n * FLOAT_TYPES["f16"].tau ** 2 / self.l**2
        variance = variance + a.u_v**2 * p_square_vv + a.u_part**2 * size.square()
        if a.u_v or a.u_part:
            variance = variance + FLOAT_TYPES["f16"].tau ** 2 / 3 / MEAN_SQUARE
        # A rounding of q is shared by all keys; its D terms are independent.
        return variance + common.square() / self.call.shape.k_size

    def _without_unseen(self, v: torch.Tensor, keys: slice) -> torch.Tensor:
        """v with keys that no row sees set to 0: what lies there may be NaN."""
        last = int(self.n_kv.max())
        if keys.stop <= last:
            return v
        v = v.clone()
        v[:, max(last - keys.start, 0) :] = 0
        return v

    def _largest_seen(self, abs_v: torch.Tensor, keys: slice) -> torch.Tensor:
        """max_j |v_ji| over the keys of a block up to each row's last: [Hkv, t, 1, Dv]."""
        prefix = abs_v.cummax(1).values
        last = (self.n_kv - keys.start).clamp(max=keys.stop - keys.start)  # [t]
        found = prefix[:, (last - 1).clamp(min=0)]  # [Hkv, t, Dv]
        return torch.where(last.view(1, -1, 1) > 0, found, 0.0)[:, :, None]


def _depth(depths: Depths, name: str, sink: bool) -> int:
    value: int = getattr(depths, name)
    if name == "d_m" and sink:
        # The sink is merged as one more part.
        return depths.parts + 1 + 3
    return value


def _step(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """Distance between neighbouring numbers of a type at x (its spacing), in float64."""
    digits, least = {"f16": (10, -24), "bf16": (7, -133), "f32": (23, -149)}[dtype]
    exponent = torch.frexp(x).exponent - 1
    return torch.ldexp(torch.ones_like(x), (exponent - digits).clamp(min=least))
