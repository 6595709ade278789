"""The sums over keys that a budget is made of, a block of keys at a time.

`Sums` adds up, for one arithmetic, the terms of the formulas in `budget`, whose names it uses, over the rows
and blocks of `budget_rows`.
"""

from __future__ import annotations

import math

import torch

from verify.kernels.budget.arithmetic import Arithmetic, Depths
from verify.kernels.budget.rows import Block, BudgetRows, add_products, finite_size, products
from verify.kernels.cache import q8_0_error
from verify.kernels.numbers import FLOAT_TYPES, FP8_TYPES, MMA_GUARD_BITS, MMA_KEYS, NUMBER_TYPES, U_F32
from verify.kernels.rotation import block_mean_square, roundings
from verify.kernels.transfers import uploaded

# Mean square of the relative rounding error, in units of u^2, of numbers whose mantissas are distributed
# logarithmically: (1/3) E[1/x^2] over [1, 2) with density 1/(x ln 2).
MEAN_SQUARE = (3.0 / 8.0) / (3.0 * math.log(2.0))
# Mean of 1/x for such a mantissa x: what half a unit in the last place is, on average, relative to a number.
MEAN_INVERSE = 0.5 / math.log(2.0)
_TAU = FLOAT_TYPES["f16"].tau
# What a right kernel may be off by, relative, whatever its arithmetic: of one that is assumed no more is
# excused, of one that is stated or read it is a limit that has a name (`judging.emulation`).
MOST_EXCUSED = 1.0 / 8.0
# Exponents of the normal numbers of float16.
_LEAST_EXPONENT, _MOST_EXPONENT = -14, 16
# A row of results below so many times half the smallest number of their type is rounded to one of few
# numbers, or to 0: no gain can be told of it.
SMALLEST_NUMBERS = 64.0


def gamma(depth: torch.Tensor | int, u: float) -> torch.Tensor:
    """d u / (1 - d u), infinite from d u = 1; of a number, float64 without dimensions."""
    du = depth * u if isinstance(depth, torch.Tensor) else torch.tensor(depth * u, dtype=torch.float64)
    return torch.where(du < 1, du / (1 - du).clamp(min=1e-300), torch.inf)


class RoundedP:
    """P rounded to its type, over the blocks of some rows: the same for all arithmetics of one `kind`."""

    def __init__(self, rows: BudgetRows, arithmetic: Arithmetic) -> None:
        self.rows = rows
        self.u, self.tau, self.promises_bits = self.kind(arithmetic)
        # Sums over keys of the variance of the rounding, in units of MEAN_SQUARE: of it times v^2, and alone.
        self.variance_vv = torch.zeros_like(rows.out)
        self.variance_1 = torch.zeros_like(rows.out[..., :1])

    @staticmethod
    def kind(a: Arithmetic) -> tuple[float, float, bool]:
        """What of an arithmetic it depends on."""
        return NUMBER_TYPES[a.p].u, a.tau_p, a.promises_bits

    def add(self, block: Block) -> None:
        """Add the terms of a block of keys; `lost`, what P may lose by rounding, is the block's then."""
        p, tau = block.p, self.tau / self.rows.l
        rounded = self.u * p
        self.lost = torch.maximum(rounded, tau).minimum(p)
        low = (rounded < tau).double()
        # An error that is uniform within +-tau has the mean square tau^2 / 3; nobody loses more than p.
        below = torch.minimum(block.square_p, tau.square() / 3).div_(MEAN_SQUARE)
        variance = rounded.square_()
        variance.addcmul_(below.sub_(variance), low)
        if self.promises_bits:
            # exp(0) = 1 is exact in every type.
            variance.mul_(block.s != self.rows.top)
        add_products(self.variance_vv, variance, block.square_v)
        self.variance_1 += variance.sum(-1, keepdim=True)


class Sums:
    """The sums of one arithmetic, over the blocks of some rows, and what they amount to."""

    def __init__(self, rows: BudgetRows, arithmetic: Arithmetic, weights: RoundedP) -> None:
        """weights: of this arithmetic's kind, to which each block is added first."""
        self.rows, self.call, self.a, self.weights = rows, rows.call, arithmetic, weights
        self.q, self.sink = rows.q, rows.sink
        self.depths = [arithmetic.depths(n) for n in rows.lengths]
        self._depths: dict[str, torch.Tensor] = {}  # by name, on the device
        self.tiles = self._per_row([d.tiles for d in self.depths])
        self.split = self._per_row([d.parts > 1 or self.sink is not None for d in self.depths])
        zeros = torch.zeros_like(rows.out)
        # Sums over keys: of |v| times what is lost by spread and rounding, and times p S; of v^2 times their
        # squares; of variances of the spread that this arithmetic has beyond `walked`, as rows have them; and
        # alone of p e^-eta, spread, rounded, p S, and of the squares of spread and rounded.
        self.lost_v, self.shared_v, self.square_vv = (zeros.clone() for _ in range(3))
        self.more_vv, self.more_v = zeros.clone(), zeros.clone()
        ones = zeros[..., :1]
        self.least_1, self.spread_1, self.rounded_1, self.shared_1 = (ones.clone() for _ in range(4))
        self.spread_square_1, self.rounded_square_1, self.more_1 = (ones.clone() for _ in range(3))
        self._stagnation: torch.Tensor | None = None

    def add(self, block: Block) -> None:
        """Add the terms of a block of keys."""
        a, p = self.a, block.p
        underflow = self._underflow(block.k)
        eta = self._eta(block, underflow)
        grown = torch.exp(eta)
        # e^eta - 1 to 2^-53: less than the least rounding that any kernel has.
        spread, rounded = (grown - 1).mul_(p), self.weights.lost * grown
        if block.bias is not None:
            # A bias far below anything hides a key as -inf does: p is 0 and e^eta infinite, not so p e^eta.
            lse = torch.where(self.rows.empty, 0.0, self.rows.lse)
            at_most = torch.exp(block.s - lse + eta)
            spread, rounded = (torch.where(p > 0, x, at_most) for x in (spread, rounded))
        self.least_1 += (p / grown).sum(-1, keepdim=True)
        self.spread_1 += spread.sum(-1, keepdim=True)
        self.rounded_1 += rounded.sum(-1, keepdim=True)
        add_products(self.lost_v, spread + rounded, block.abs_v)
        squares, more = spread.square_(), rounded.square_()
        self.spread_square_1 += squares.sum(-1, keepdim=True)
        self.rounded_square_1 += more.sum(-1, keepdim=True)
        add_products(self.square_vv, squares.add_(more), block.square_v)
        if a.u_q or underflow is not None:
            shared = a.u_q * block.big_s
            shared = block.seen.only(shared if underflow is None else shared + underflow).mul_(p)
            add_products(self.shared_v, shared, block.abs_v)
            self.shared_1 += shared.sum(-1, keepdim=True)
        if a.u_k or self.call.softcap is not None:
            relative = a.u_k**2 / 2 * block.big_s.square()
            if self.call.softcap is not None:
                relative += a.u_tanh**2 * block.abs_s.square()
            relative.mul_(block.square_p)
            add_products(self.more_vv, relative, block.square_v)
            add_products(self.more_v, relative, block.v)
            self.more_1 += relative.sum(-1, keepdim=True)

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """bound [Hkv, t, r, Dv] and lse_bound [Hkv, t, r], when every block has been added."""
        a, u, rows = self.a, self.a.u, self.rows
        self._add_sink()
        spread_1, rounded_1 = self.spread_1, self.rounded_1
        w = self._positive(self.least_1)
        abs_o, from_rounded = rows.out.abs(), float(a.l_from_rounded_p)
        first = (self.lost_v + spread_1 * abs_o + from_rounded * rounded_1 * abs_o) / w
        gamma_m, gamma_l = gamma(self._depth("d_m"), u), gamma(self._depth("d_l"), u)
        gamma_n = gamma(self._depth("d_n"), a.u_acc)
        total = first + (gamma_n + gamma_m + a.u_v + a.u_part) * (rows.size + first)
        total = total + (gamma_l + gamma_m + 3 * u) * (abs_o + first)
        # Of every P in the numerator, and of their sum; and of what was summed before each larger maximum. In
        # any order of a row's tiles ln n of these are due, and log2 n are hardly ever exceeded.
        exponentials = a.u_exp * torch.minimum(self.tiles, 1 + rows.log_n / math.log(2.0))
        total = total + exponentials * (rows.size + abs_o)
        if a.acc == "f16":
            # Every rounding of a float16 accumulator may also underflow, in units of exp(s - m).
            total = total + self._depth("d_n") * a.tau_acc / rows.l
        total = total + _TAU * ((a.u_v > 0) + (a.u_part > 0))
        total = torch.minimum(total.nan_to_num(nan=math.inf, posinf=math.inf), rows.cap + abs_o)
        out_type, n = FLOAT_TYPES[a.out], rows.n_kv.view(1, -1, 1, 1).double()
        bound = total + (out_type.u + U_F32) * (abs_o + total) + out_type.tau + n * 2.0**-149

        lse_bound = torch.maximum(torch.log1p(spread_1), -torch.log(w.clamp(min=1e-300)))
        lse_bound = lse_bound + gamma_l + self.split * gamma_m + from_rounded * rounded_1 / w
        abs_lse = torch.where(rows.empty, 0.0, rows.lse).abs()
        lse_bound = lse_bound + 2 * u * (abs_lse + rows.log_n + 1) + u * rows.largest + U_F32 * abs_lse
        lse_bound = lse_bound + exponentials
        # The offset is added to the maximum, and back to the logarithm of a sum that it has made smaller.
        lse_bound = lse_bound + 4 * u * abs(a.p_shift)
        # Where e^eta overflows nothing is known: logits so large that float32 has no digits below 1.
        lse_bound = lse_bound.nan_to_num(nan=math.inf, posinf=math.inf)
        return bound, lse_bound.squeeze(-1)

    def expected(self) -> torch.Tensor:
        """Root mean square of the error of a correct kernel, [Hkv, t, r, Dv]."""
        common = self.shared_v + self.shared_1 * self.rows.out.abs()
        variance = MEAN_SQUARE * self._expected_variance(common)
        one_way = self._shrinkage().square() + self.stagnation().square()
        return (variance + one_way + _step(self.rows.out, self.a.out).square() / 12).sqrt()

    def quadrature(self, bound: torch.Tensor) -> torch.Tensor:
        """Root of the sum of squares of the single bounds, at most `bound`; after `bounds`."""
        a, u, rows = self.a, self.a.u, self.rows
        w, spread_square_1, rounded_square_1 = (
            self._positive(self.least_1),
            self.spread_square_1,
            self.rounded_square_1,
        )
        square_o, size, out_type = rows.out.square(), rows.size, FLOAT_TYPES[a.out]
        common = self.shared_v + self.shared_1 * rows.out.abs()
        quadrature = (
            self.square_vv / w.square()
            + (spread_square_1 + float(a.l_from_rounded_p) * rounded_square_1) * square_o / w.square()
            + (a.u_acc**2 * self._depth("d_n") + (a.u_v + a.u_part) ** 2) * size.square()
            + u**2 * (self._depth("d_l") + 2 * self._depth("d_m") + 9) * (size.square() + square_o)
            # What all keys of a tile or part share cannot be added in squares over keys.
            + (3 * u) ** 2 * self.tiles * (size + rows.out.abs()).square()
            + common.square()
            + self._shrinkage().square()
            + self.stagnation().square()
            + (out_type.u + U_F32) ** 2 * square_o
            + self._depth("d_n") * (a.tau_acc / rows.l) ** 2
            + (out_type.tau + _TAU * ((a.u_v > 0) + (a.u_part > 0))) ** 2
        ).sqrt()
        return torch.minimum(quadrature.nan_to_num(nan=math.inf, posinf=math.inf), bound)

    def bias(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What roundings that go one way may make of <err, o> / <o, o>, [Hkv, t, r]: as the arithmetic says;
        and how far down and up they may take it if the arithmetic is only assumed.

        With <a> = <a, |o|> / <o, o>, by what the arithmetic says

            shrinking <sum p|v|>                   accumulators that truncate (`Arithmetic.shrinking`)
            <stagnation>                           float16 accumulators (`stagnation`)
            u_p <sqrt(sum p^2 v^2)>                the largest P, where it is no power of two: it is rounded
                                                   alike in every row, and sum p^2 v^2 >= (p v)^2 of it

        and where it is assumed, the second whatever the maximum is, and downwards alone

            u_p <sum p|v|> + u_out                 P, or the result, truncated: 0.72 of a unit on average

        of which an assumed arithmetic excuses an eighth at most.
        """
        a, out = self.a, self.rows.out
        power = out.square().sum(-1)

        def along(x: torch.Tensor) -> torch.Tensor:
            return (x * out.abs()).sum(-1) / power.clamp(min=1e-300)

        u_p, truncated = NUMBER_TYPES[a.p].u, along(self.rows.size)
        stagnating = along(self.stagnation())
        largest = u_p * along(self.rows.p_square_vv.sqrt())
        bias = self._per_row([a.shrinking(n) for n in self.rows.lengths]).squeeze(-1) * truncated + stagnating
        if not (a.stated and a.exact_maximum):
            rises = bias + largest
        else:
            rises = bias
        falls = rises
        if a.stated:
            bias = rises
        else:
            falls = falls + u_p * truncated + FLOAT_TYPES[a.out].u
            bias, falls, rises = (x.clamp(max=MOST_EXCUSED) for x in (bias, falls, rises))
        least = SMALLEST_NUMBERS * FLOAT_TYPES[a.out].tau
        few = (power < least**2 * out.shape[-1]) & (power > 0)
        return tuple(torch.where(few, math.inf, x) for x in (bias, falls, rises))  # type: ignore[return-value]

    def _shrinkage(self) -> torch.Tensor:
        """What truncating accumulators lose on average, [Hkv, t, r, Dv]: not a random error, it adds up.

            steps * passes * 2^-24 * MEAN_INVERSE * |A| * (1/2) (1 + c * MMA_KEYS / 2^MMA_GUARD_BITS)

        A matrix instruction drops what lies below the last place of its sum, half a unit on average, and of
        each of its products what lies below the guard bits, which adds up where the products have one sign:
        c = |o| / sum p|v|. |A|^2 = o^2 + sum p^2 v^2 is the size that partial sums reach, half of it their
        mean while they grow.
        """
        steps = self._depth("summed") / MMA_KEYS
        if self.a.acc == "f16" and self.a.u != U_F32:
            # Sums among the subnormal numbers lose half a unit a step, and mostly the same way.
            return (steps * self.a.tau_acc / self.rows.l).expand_as(self.rows.out)
        if not self.a.truncates:
            return torch.zeros_like(self.rows.out)
        size = self.rows.size.clamp(min=torch.finfo(torch.float64).tiny)
        one_sign = self.rows.out.abs() / size * (MMA_KEYS / 2**MMA_GUARD_BITS)
        reached = (self.rows.out.square() + self.rows.p_square_vv).sqrt()
        return steps * self.a.passes * U_F32 * MEAN_INVERSE / 2 * reached * (1 + one_sign)

    def stagnation(self) -> torch.Tensor:
        """What float16 accumulators lose or gain one way, since their steps are alike: [Hkv, t, r, Dv].

        A part adds N steps of mean mu = |A| / N and deviation sigma to a sum that grows evenly from 0 to A,
        in units of exp(s - m - p_shift). Among numbers that lie w apart a step becomes a multiple of w. Where
        sigma is small beside w, every step is rounded the same way: by w / 2 at most, and whole (the sum
        stagnates) where mu < w / 2. Where it is not, roundings average out: the mean of x - round(x) over a
        normal x has the Fourier coefficients e^(-2 pi^2 k^2 (sigma/w)^2) / (pi k), whose sum is at most

            h = -ln(1 - e^(-2 pi^2 (sigma/w)^2)) / pi          (k^2 >= k)

        so a step is off by min(w / 2, w h, mu) on average; w is constant between powers of two.
        """
        if self._stagnation is None:
            self._stagnation = self._found_stagnation()
        return self._stagnation

    def _found_stagnation(self) -> torch.Tensor:
        a, rows = self.a, self.rows
        if a.acc != "f16":
            return torch.zeros_like(rows.out)
        keys = a.sum_step if a.block is not None and a.cuts_at is not None else 1
        n = self._per_row([float(max(n, 1)) for n in rows.lengths])
        weight = rows.l * math.exp(-a.p_shift)
        mean = rows.out.abs() * weight / n
        spread = (rows.p_square_vv * weight.square() / n - mean.square()).clamp(min=0)
        mu, sigma = keys * mean, (keys * spread).sqrt()
        top = (mean * self._depth("summed")).clamp(min=torch.finfo(torch.float64).tiny)
        lost = torch.zeros_like(top)
        for exponent in range(_LEAST_EXPONENT, _MOST_EXPONENT):
            if not top.is_cuda and top.max() <= 2.0**exponent:
                break  # No sum comes so far. A GPU would be waited for, to know.
            share = (top.clamp(max=2.0 ** (exponent + 1)) - 2.0**exponent).clamp(min=0) / top
            apart = 2.0 ** (exponent - 10)
            averaged = -torch.log1p(
                -torch.exp(-2 * math.pi**2 * (sigma / apart).square()).clamp(max=1 - 1e-12)
            )
            lost += share * torch.minimum((averaged / math.pi).clamp(max=0.5) * apart, mu)
        return lost * n / keys / weight

    def _add_sink(self) -> None:
        """The sink is one more key, whose value is 0."""
        if self.sink is None:
            return
        p = torch.where(self.rows.empty, 0.0, torch.exp(self.sink - self.rows.lse))
        eta = self._exponent_error(finite_size(self.sink))
        self.least_1 += p * torch.exp(-eta)
        self.spread_1 += p * torch.expm1(eta)
        self.spread_square_1 += (p * torch.expm1(eta)).square()

    @staticmethod
    def _positive(w: torch.Tensor) -> torch.Tensor:
        return torch.where(w > 0, w, 1.0)

    def _per_row(self, values: list[int] | list[bool] | list[float]) -> torch.Tensor:
        return uploaded(values, self.q.device, torch.float64).view(1, -1, 1, 1)

    def _depth(self, name: str) -> torch.Tensor:
        if name not in self._depths:
            self._depths[name] = self._per_row([_depth(d, name, self.sink is not None) for d in self.depths])
        return self._depths[name]

    def _exponent_error(self, abs_s: torch.Tensor) -> torch.Tensor:
        """eta of a logit that is given, not computed."""
        each, shared = self._exponent_error_parts()
        return each * abs_s + shared

    def _exponent_error_parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """That eta by |s|: what |s| is multiplied by, and what is added, [1, t, 1, 1] and [Hkv, t, r, 1]."""
        u = self.a.u
        each = 4 * u + self.split * (2 * u)
        shared = each * (self.rows.largest + abs(self.a.p_shift)) + self.tiles * 3 * u
        return each, shared + self.split * (4 * u * self.rows.log_n + 6 * u)

    def _underflow(self, k: torch.Tensor) -> torch.Tensor | None:
        """Error of the logits where q or k underflow in a cast, or q becomes blocks: [Hkv, t, r, n]; None
        where they do not."""
        a, tau, scale = self.a, _TAU, abs(self.call.scale)
        if not (a.u_q or a.u_k or a.q_blocks or a.q_scaled or a.k_rotation):
            return None
        error = self.q.new_zeros((1, 1, 1, 1))
        if a.u_q:
            # The scale may be multiplied in before the cast or after it.
            error = error + tau * max(scale, 1.0) * k.abs().sum(1)[:, None, None]
        if a.u_k:
            error = error + tau * scale * self.q.abs().sum(-1, keepdim=True)
        if a.q_blocks:
            error = error + scale * products(q8_0_error(self.q), k.abs())
        if a.q_scaled:
            kind = FP8_TYPES[a.q_scaled]
            lost = self.q.abs().amax(-1, keepdim=True) * (kind.tau / kind.largest)
            error = error + scale * lost * k.abs().sum(1)[:, None, None]
        if a.k_rotation:
            # |H| |q| of a block is at most its norm; k was rotated too, and back where it is told here.
            norms = block_mean_square(self.q, a.k_rotation) * math.sqrt(a.k_rotation)
            turned = 3 * roundings(a.k_rotation) * U_F32
            error = error + scale * turned * products(norms, k.abs())
        return error

    def _eta(self, block: Block, underflow: torch.Tensor | None) -> torch.Tensor:
        """eta; 0, or what does no harm, where a row does not see the key."""
        a, u, cap = self.a, self.a.u, self.call.softcap
        depth = self.call.shape.k_size
        relative = (1 + depth * u / (1 - depth * u)) * (1 + a.u_q) * (1 + a.u_k) - 1
        product = relative * block.big_s
        if underflow is not None:
            product = product + underflow
        if cap is not None:
            tanh = torch.tanh(block.raw / cap)
            product = product * (1 - tanh.square()) * torch.exp(2 * product / cap)
            product = product + (4 * u + a.u_tanh) * cap * tanh.abs()
        if self.call.alibi_slopes is not None:
            slopes = self.call.alibi_slopes.double().view(self.rows.heads, 1, self.rows.r, 1).abs()
            distance = (self.rows.n_kv.view(1, -1, 1, 1) - 1 - block.positions).clamp(min=0)
            # The unbiased logit and the bias may each be larger than their sum.
            product = product + 4 * u * slopes * distance
        if block.bias is not None:
            product = product + 4 * u * block.bias
        each, shared = self._exponent_error_parts()
        eta = product.addcmul_(block.abs_s, each).add_(shared)
        # Elsewhere it may be infinite or NaN.
        return eta if block.seen.weight is not None else block.seen.only(eta)

    def _expected_variance(self, common: torch.Tensor) -> torch.Tensor:
        """Variance of the error, in units of MEAN_SQUARE, the rounding of the result left aside."""
        a, u = self.a, self.a.u
        out, size, p_square_vv = self.rows.out, self.rows.size, self.rows.p_square_vv
        # Of exp's relative error: what roundings of u make of it, and the rest.
        spread_vv = u**2 * self.rows.walked_vv + self.more_vv
        spread_v = u**2 * self.rows.walked_v + self.more_v
        spread_1 = u**2 * self.rows.walked_1 + self.more_1
        square_o = out.square()
        # sum_j c_j (v_j - o)^2, multiplied out.
        variance = (spread_vv - 2 * out * spread_v + spread_1 * square_o).clamp(min=0)
        rounded_1 = a.l_from_rounded_p * self.weights.variance_1 * square_o
        variance = variance + self.weights.variance_vv + rounded_1
        d_n, d_l = self._depth("d_n"), self._depth("d_l")
        variance = variance + u**2 * d_l * (p_square_vv + square_o)
        if a.acc == "f16":
            # Partial sums grow from nothing to o: like t where signs agree, like sqrt(t) where they do not.
            steps = a.u_acc**2 * d_n * (square_o / 3 + p_square_vv / 2)
            variance = variance + steps + d_n * a.tau_acc**2 / 3 / MEAN_SQUARE / self.rows.l**2
        variance = variance + a.u_v**2 * p_square_vv + a.u_part**2 * size.square()
        if a.u_v or a.u_part:
            variance = variance + _TAU**2 / 3 / MEAN_SQUARE
        # A rounding of q is shared by all keys; its D terms are independent.
        return variance + common.square() / self.call.shape.k_size


def _depth(depths: Depths, name: str, sink: bool) -> int:
    value: int = getattr(depths, name)
    if name == "d_m" and sink:
        # The sink is merged as one more part.
        return depths.parts + 1 + 3
    return value


def _step(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """Distance between neighbouring numbers of a type at x (its spacing), in float64."""
    kind = FLOAT_TYPES[dtype]
    # frexp has the exponent 0 for 0, whose neighbour is the smallest subnormal.
    spacing = (torch.frexp(x).exponent - 1 - kind.digits).clamp(min=kind.least)
    exponent = torch.where(x == 0, kind.least, spacing)
    return torch.ldexp(torch.ones_like(x), exponent)
