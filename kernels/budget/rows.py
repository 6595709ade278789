"""What a budget's rows are by themselves: logits, weights and the exact result, a block of keys at a time.

Nothing here depends on a kernel: `budget_sums` adds up what each arithmetic makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from verify.kernels.call import Call
from verify.kernels.exact import finish_logits
from verify.kernels.exponentials import flushed_exp_
from verify.kernels.sequences import CallSequence
from verify.kernels.transfers import uploaded

# Weights are e^-300 and more, so that no square of one is a subnormal number.
_LEAST_EXPONENT = -300.0
# Stands for the infinite where 0 times it is to be 0.
_FINITE = 1e300
# Logits of all blocks of some rows, that are held from the first pass to the second.
_LOGITS_HELD = 1 << 22
# Lengths of rows up to which their largest values are found from one to the next on a GPU, where running
# maxima along the keys go a key at a time, 8,192 of them for milliseconds.
_MOST_STEPS = 32


def finite_size(sink: torch.Tensor) -> torch.Tensor:
    """|sink|; 0 for a sink of -inf, which is no key at all."""
    return torch.where(torch.isneginf(sink), 0.0, sink.abs())


class SeenKeys(NamedTuple):
    """Which keys of a block its rows see, [Hkv, t, r, n]."""

    mask: torch.Tensor | None  # True where a row sees the key; None: every row sees all
    # The same as 1.0 and 0.0, where numbers that no row sees are finite: on a CPU a product takes a tenth of
    # the time of a choice. None on a GPU.
    weight: torch.Tensor | None

    def only(self, x: torch.Tensor) -> torch.Tensor:
        """x with 0 where a row does not see the key."""
        if self.mask is None:
            return x
        return x * self.weight if self.weight is not None else torch.where(self.mask, x, 0.0)


class Block(NamedTuple):
    """Some keys of some rows, in float64. Logits before and after softcap, bias and mask."""

    positions: torch.Tensor  # [n]
    k: torch.Tensor  # [Hkv, Dk, n]
    raw: torch.Tensor  # logits before, [Hkv, t, r, n]
    s: torch.Tensor  # logits after, [Hkv, t, r, n]
    big_s: torch.Tensor  # S_j, sums of the products' sizes, 0 where it does not see, [Hkv, t, r, n]
    seen: SeenKeys  # whether the row sees the key
    abs_s: torch.Tensor  # |s|, 0 where it does not see, [Hkv, t, r, n]
    p: torch.Tensor  # weights, [Hkv, t, r, n]
    square_p: torch.Tensor  # p^2, [Hkv, t, r, n]
    v: torch.Tensor  # [Hkv, n, Dv]
    abs_v: torch.Tensor  # |v|, likewise
    square_v: torch.Tensor  # v^2, likewise
    # |b| of numbers b that a mask adds, 0 where it hides, in a shape that broadcasts to s; None: none.
    bias: torch.Tensor | None


class BudgetRows:
    """Some rows [t] of one sequence: the exact result, and the blocks of keys that it is summed over.

    n_kv [t]: keys up to each row's last; lengths: keys that it goes through, fewer where it lists them.

    top, l, lse: of the whole row, sink included; largest: m; empty: the row sees nothing; all [Hkv, t, r, 1].
    out, size (sum_j p_j |v_j|), p_square_vv (sum_j p_j^2 v_j^2) and cap (max_j |v_j|) [Hkv, t, r, Dv], and
    walked_vv, walked_v and walked_1 (sum_j p_j^2 z_j of z_j v_j^2, v_j and 1, z being `_walked`) are complete
    when `blocks` has ended.
    """

    def __init__(self, call: Call, sequence: CallSequence, which: Sequence[int]) -> None:
        rows = uploaded(which, call.q.device, torch.int64)
        self.call, self.sequence, self.rows = call, sequence, rows
        shape = call.shape
        self.heads, self.r = shape.kv_heads, shape.ratio
        q = sequence.q[rows].double()
        self.q = q.view(len(rows), self.heads, self.r, -1).permute(1, 0, 2, 3)
        self.n_kv = sequence.kv_len[rows].long()
        self.lengths = [sequence.n_kv[t] for t in which]
        self.last = [sequence.lengths[t] for t in which]
        self.query_heads = torch.arange(shape.q_heads, device=q.device).view(self.heads, self.r)
        n = self.n_kv.view(1, -1, 1, 1).double()
        self.sink: torch.Tensor | None = None
        if call.sinks is not None:
            self.sink = call.sinks.double().view(self.heads, 1, self.r, 1)
        self.log_n = torch.log(n.clamp(min=1) + (self.sink is not None))
        zeros = self.q.new_zeros((self.heads, len(rows), self.r, shape.v_size))
        self.out, self.size, self.p_square_vv, self.cap = (zeros.clone() for _ in range(4))
        self.walked_vv, self.walked_v = (zeros.clone() for _ in range(2))
        self.walked_1 = zeros[..., :1].clone()
        # Logits of the blocks that are still to come, where they are few enough to be held.
        self._held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def blocks(self, keys_at_once: int) -> Iterator[Block]:
        """Every block of keys that some row sees, in order, after two passes over K: one finds l."""
        last, first = max(self.last), 0
        if self.call.sliding_window is not None:
            first = max(min(self.last) - self.call.sliding_window, 0)
        pieces = [slice(at, min(at + keys_at_once, last)) for at in range(first, last, keys_at_once)]
        self._normaliser(pieces)
        for keys in pieces:
            s, raw, k = self._held.pop(0) if self._held else self._logits(keys)
            v = self.sequence.v[keys].double().permute(1, 0, 2)  # [Hkv, n, Dv]
            big_s = products(self.q.abs(), k.abs()).mul_(abs(self.call.scale))
            abs_s = s.abs()
            seen = self._seen(abs_s, raw, big_s)
            bias = self._bias(keys)
            below = s - torch.where(self.empty, 0.0, self.lse)
            if bias is None:
                # No weight is taken for less: no number shows by how much a budget is larger for it, and
                # subnormal numbers, which the squares of smaller weights are, cost a hundred times as much.
                below.clamp_min_(_LEAST_EXPONENT)
            p = seen.only(below.exp_())
            block = Block(
                positions=torch.arange(keys.start, keys.stop, device=self.q.device),
                k=k,
                raw=raw,
                s=s,
                big_s=seen.only(big_s),
                seen=seen,
                abs_s=seen.only(abs_s.clamp_max_(_FINITE)),
                p=p,
                square_p=p.square(),
                v=v,
                abs_v=v.abs(),
                square_v=v.square(),
                bias=bias,
            )
            add_products(self.out, p, v)
            add_products(self.size, p, block.abs_v)
            add_products(self.p_square_vv, block.square_p, block.square_v)
            walked = self._walked(block).mul_(block.square_p)
            add_products(self.walked_vv, walked, block.square_v)
            add_products(self.walked_v, walked, v)
            self.walked_1 += walked.sum(-1, keepdim=True)
            self.cap = torch.maximum(self.cap, self._largest_seen(block.abs_v, keys))
            yield block

    @staticmethod
    def _seen(abs_s: torch.Tensor, raw: torch.Tensor, big_s: torch.Tensor) -> SeenKeys:
        """Of |s|, which is infinite where a row does not see the key; raw and big_s: see `Block`."""
        if abs_s.is_cuda:
            return SeenKeys(torch.isfinite(abs_s), None)
        if bool(abs_s.amax() < math.inf):
            return SeenKeys(None, None)
        mask = abs_s < math.inf
        # NaN is neither seen nor finite.
        finite = bool(big_s.amax() < math.inf) and not bool(torch.isnan(raw.amax() + abs_s.amax()))
        return SeenKeys(mask, mask.double() if finite else None)

    def _walked(self, block: Block) -> torch.Tensor:
        """Squares of what the roundings of a logit and of exp are relative to, by the same u: [Hkv, t, r, n].

        Partial sums of q.k wander where signs differ. Where one column makes the logit, as outlying channels
        of real keys do, they are as large as it from there on, and each of D steps rounds that."""
        grown = block.seen.only(block.raw)
        if self.call.softcap is not None:
            grown = grown * (1 - torch.tanh(grown / self.call.softcap).square())
        walked = block.big_s.square().mul_(0.5)
        walked.addcmul_(grown, grown, value=self.call.shape.k_size).addcmul_(
            block.abs_s, block.abs_s, value=4
        )
        return walked.add_(4 * self.largest.square() + 4)

    def _logits(self, keys: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """s and the raw products [Hkv, t, r, n] of a block of keys, and the keys themselves [Hkv, Dk, n]."""
        k = self.sequence.k[keys].double().permute(1, 2, 0)
        raw = products(self.q, k).mul_(self.call.scale)
        positions = torch.arange(keys.start, keys.stop, device=self.q.device)
        return finish_logits(raw, self.n_kv, positions, self.call, self.mask_of(keys)), raw, k

    def _bias(self, keys: slice) -> torch.Tensor | None:
        mask = self.mask_of(keys)
        if mask is None or mask.dtype == torch.bool:
            return None
        return torch.where(torch.isneginf(mask), 0.0, mask.double().abs())

    def mask_of(self, keys: slice) -> torch.Tensor | None:
        """The mask of these rows and some keys, as it broadcasts to [Hkv, t, r, n]."""
        return self.sequence.mask_of(self.rows, keys, self.query_heads, kv_heads=self.heads)

    def _normaliser(self, pieces: list[slice]) -> None:
        """top, l, lse, largest, empty."""
        shape = (self.heads, len(self.last), self.r, 1)
        m = self.q.new_full(shape, -math.inf)
        total = self.q.new_zeros(shape)
        holds = math.prod(shape) * (pieces[-1].stop - pieces[0].start if pieces else 0) <= _LOGITS_HELD
        for keys in pieces:
            found = self._logits(keys)
            if holds or len(pieces) == 1:
                self._held.append(found)
            s = found[0]
            new = torch.maximum(m, s.amax(-1, keepdim=True))
            shift = torch.where(torch.isneginf(new), 0.0, new)
            total = total * torch.exp(m - shift) + flushed_exp_(s - shift).sum(-1, keepdim=True)
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
            self.largest = torch.maximum(self.largest, finite_size(self.sink))
        self.top = shift

    def _largest_seen(self, abs_v: torch.Tensor, keys: slice) -> torch.Tensor:
        """max_j |v_ji| over the keys of a block up to each row's last: [Hkv, t, 1, Dv]."""
        if min(self.last) >= keys.stop:
            # The usual case. Running maxima along a dimension that is not the last are slow on a GPU.
            return abs_v.amax(1)[:, None, None]
        ends = [min(max(last - keys.start, 0), keys.stop - keys.start) for last in self.last]
        places = sorted(set(ends))
        if abs_v.is_cuda and len(places) > _MOST_STEPS:
            prefix = abs_v.cummax(1).values
            last = (self.n_kv - keys.start).clamp(max=keys.stop - keys.start)  # [t]
            found = prefix[:, (last - 1).clamp(min=0)]  # [Hkv, t, Dv]
            return torch.where(last.view(1, -1, 1) > 0, found, 0.0)[:, :, None]
        # From the end of one row to that of the next: a key is read once.
        so_far, most = abs_v.new_zeros((abs_v.shape[0], abs_v.shape[2])), {}
        for begin, end in pairwise([0, *places]):
            if end > begin:
                so_far = torch.maximum(so_far, abs_v[:, begin:end].amax(1))
            most[end] = so_far
        return torch.stack([most[end] for end in ends], 1)[:, :, None]


def products(a: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[Hkv, t, r, n] times [Hkv, n, m]."""
    heads, t, r, n = a.shape
    return torch.bmm(a.reshape(heads, t * r, n), x).view(heads, t, r, -1)


def add_products(total: torch.Tensor, a: torch.Tensor, x: torch.Tensor) -> None:
    """total [Hkv, t, r, m] += [Hkv, t, r, n] times [Hkv, n, m], in place."""
    heads, t, r, n = a.shape
    whole = total.view(heads, t * r, -1)
    torch.baddbmm(whole, a.reshape(heads, t * r, n), x, out=whole)
