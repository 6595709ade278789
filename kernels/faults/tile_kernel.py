"""A compact correct attention kernel in overridable steps: what faults and variants are made of.

All query heads and all rows of one n_kv together: their keys in KV parts, a part in tiles, the online softmax
over tiles, (o, lse) of each part stored, the parts merged. It is written to be read and to be broken in one
place, not to be fast; `eager` is the kernel to compare with.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import AttentionPath, Call, Result, Shape
from verify.kernels.capabilities import Capabilities
from verify.kernels.kernel import Kernel
from verify.kernels.merge import Merge, Part, merge_sequential
from verify.kernels.numbers import FLOAT_TYPES, MMA_KEYS
from verify.kernels.plans.plan import KVCuts, Plan, RowPlan
from verify.kernels.trace import Launched, RowKind, Signature


@dataclass(frozen=True)
class TileRow:
    """Query rows of one sequence that see the same keys."""

    call: Call  # that they are rows of
    b: int  # number of the sequence
    t: torch.Tensor  # numbers of the rows, [t]
    n: int  # they see keys 0 .. n-1
    q: torch.Tensor  # [t, Hq, Dk] float32
    kv_head: torch.Tensor  # of every query head, [Hq]
    # First key and end of each part, counted where it is closed.
    closed: list[tuple[int, int]] = field(default_factory=list)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Bounds of the parts that were closed; -1 where one does not begin at the end of the one before."""
        parts = sorted(self.closed)
        inner = [end if first == end else -1 for (_, end), (first, _) in pairwise(parts)]
        return (parts[0][0], *inner, parts[-1][1]) if parts else (0,)


@dataclass
class State:
    """The online softmax: running maximum m and denominator l [t, Hq], accumulator a [t, Hq, Dv]."""

    m: torch.Tensor
    l: torch.Tensor
    a: torch.Tensor


class TileKernel(Kernel):
    """The correct kernel. `plan` is asked for, `p`, `out`, `acc` as in `Arithmetic`."""

    def __init__(
        self,
        spec: str,
        *,
        heads: tuple[int, ...] | None = None,
        kv: int = 1,
        block: int = 64,
        p: str = "f16",
        out: str = "f32",
        acc: str = "f32",
    ) -> None:
        super().__init__(spec)
        self.plan = Plan(heads=heads, kv=KVCuts("parts", kv), block=block)
        self.p, self.out, self.acc = p, out, acc

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return Arithmetic(
            p=self.p,
            out=self.out,
            acc=self.acc,
            block=self.plan.block,
            cuts_at=lambda n: self.planned(shape, n).cuts,
        )

    def planned(self, shape: Shape, n: int) -> RowPlan:
        """The plan of a row, as it was asked for."""
        return self.plan.at(shape.asked("decode").of_keys(n))

    def capabilities(self) -> Capabilities:
        # Rows of one n_kv are computed together: other products, other bits.
        return Capabilities(row_alone=False)

    def merger(self) -> Merge:
        return lambda parts: self.merge(list(parts))

    def run(self, call: Call) -> Result:
        self.refuse_forms(call)
        shape = call.shape
        ran: Counter[RowKind] = Counter()
        out = call.q.new_zeros((shape.batch, shape.rows, shape.q_heads, shape.v_size), dtype=torch.float32)
        lse = call.q.new_zeros((shape.batch, shape.rows, shape.q_heads), dtype=torch.float32)
        for b in range(shape.batch):
            for n_kv in call.kv_len[b].unique().tolist():
                t = (call.kv_len[b] == n_kv).nonzero()[:, 0]
                n = self.visible(call, n_kv)
                plan = self.plan_of(shape, n)
                row = TileRow(
                    call=call,
                    b=b,
                    t=t,
                    n=n,
                    q=self.query(call, b, t),
                    kv_head=self.kv_heads(shape, plan.head_groups),
                )
                result = self.row(row, plan)
                out[b, t], lse[b, t] = self.store(result)
                # All heads are computed together: their groups are those that `kv_heads` was given.
                signature = Signature(f"tile[{self.spec}]", "torch", plan.head_groups, row.cuts, "one")
                ran[call.path, n_kv, signature] += len(t)
        return Result(out, lse, Launched(ran))

    # The steps, in the order in which they run.

    def visible(self, call: Call, n_kv: int) -> int:
        return n_kv

    def plan_of(self, shape: Shape, n: int) -> RowPlan:
        """The plan that runs."""
        return self.planned(shape, n)

    def query(self, call: Call, b: int, t: torch.Tensor) -> torch.Tensor:
        return call.q[b, t].float()

    def kv_heads(self, shape: Shape, groups: tuple[int, ...]) -> torch.Tensor:
        """The KV head of every query head, [Hq]."""
        return torch.arange(shape.q_heads) // shape.ratio

    def row(self, row: TileRow, plan: RowPlan) -> Part:
        """The parts of a row, and their merge."""
        parts = [self.part(row, a, b) for a, b in self.part_bounds(plan.cuts)]
        parts = self.stored(row, parts)
        if row.call.sinks is not None:
            parts = self.with_sink(row, parts)
        return self.merge(parts) if parts else self.no_part(row)

    def part_bounds(self, cuts: tuple[int, ...]) -> list[tuple[int, int]]:
        return list(pairwise(cuts))

    def part(self, row: TileRow, start: int, stop: int) -> Part:
        state, tiles = self.begin(row), self.tiles(start, stop)
        for first, last in tiles:
            s = self.logits(row, self.keys(row, first, last))
            s = self.mask(row, self.bias(row, self.cap(row, s), first), first)
            self.update(state, s, self.values(row, first, last))
        row.closed.append((min(first for first, _ in tiles), max(last for _, last in tiles)))
        return self.closed(state)

    def begin(self, row: TileRow) -> State:
        heads, size = row.q.shape[:2], row.call.shape.v_size
        zeros = row.q.new_zeros(heads)
        return State(zeros - math.inf, zeros, row.q.new_zeros((*heads, size)))

    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        block = self.plan.block
        return [(first, min(first + block, stop)) for first in range(start, stop, block)]

    def load(self, x: torch.Tensor, row: TileRow, first: int, last: int) -> torch.Tensor:
        """Keys or values first .. last-1 as every query head reads them: [n, Hq, D] float32."""
        return x[row.b, first:last].float().index_select(1, row.kv_head.to(x.device))

    def keys(self, row: TileRow, first: int, last: int) -> torch.Tensor:
        return self.load(row.call.k, row, first, last)

    def values(self, row: TileRow, first: int, last: int) -> torch.Tensor:
        return self.load(row.call.v, row, first, last)

    def logits(self, row: TileRow, k: torch.Tensor) -> torch.Tensor:
        """[t, Hq, n]"""
        return torch.bmm(row.q.transpose(0, 1), k.permute(1, 2, 0)).transpose(0, 1) * row.call.scale

    def cap(self, row: TileRow, s: torch.Tensor) -> torch.Tensor:
        c = row.call.softcap
        return s if c is None else c * torch.tanh(s / c)

    def bias(self, row: TileRow, s: torch.Tensor, first: int) -> torch.Tensor:
        if row.call.alibi_slopes is None:
            return s
        distance = torch.arange(first, first + s.shape[-1], device=s.device) - (row.n - 1)
        return s + row.call.alibi_slopes.float()[:, None] * distance

    def mask(self, row: TileRow, s: torch.Tensor, first: int) -> torch.Tensor:
        positions = torch.arange(first, first + s.shape[-1], device=s.device)
        hidden = positions >= row.n
        if row.call.sliding_window is not None:
            hidden = hidden | (positions < row.n - row.call.sliding_window)
        return s.masked_fill(hidden, -math.inf)

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)

    def rescaled(self, state: State, m: torch.Tensor) -> None:
        """Move the running maximum to m."""
        shift = torch.where(torch.isneginf(m), 0.0, m)
        c = self.exp(state.m - shift)
        state.m, state.l, state.a = m, state.l * c, state.a * c[..., None]

    def update(self, state: State, s: torch.Tensor, v: torch.Tensor) -> None:
        """One tile of keys."""
        self.rescaled(state, torch.maximum(state.m, s.amax(-1)))
        shift = torch.where(torch.isneginf(state.m), 0.0, state.m)
        p = self.exp(s - shift[..., None])
        state.l = state.l + self.summed(p)
        state.a = self.accumulate(state.a, p.to(FLOAT_TYPES[self.p].dtype).float(), v)

    def summed(self, p: torch.Tensor) -> torch.Tensor:
        return p.sum(-1)

    def accumulate(self, a: torch.Tensor, p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.acc == "f16":
            return accumulate_f16(a, p, v)
        return a + torch.bmm(p.transpose(0, 1), v.transpose(0, 1)).transpose(0, 1)

    def closed(self, state: State) -> Part:
        """The normalised result of a part; nothing seen gives (0, -inf)."""
        empty = state.l == 0
        o = state.a / torch.where(empty, 1.0, state.l)[..., None]
        return Part(o, torch.where(empty, -math.inf, state.m + torch.log(state.l)))

    def stored(self, row: TileRow, parts: list[Part]) -> list[Part]:
        """Partial results as they are written to memory and read back."""
        return parts

    def no_part(self, row: TileRow) -> Part:
        """The result of a row that sees no key."""
        return self.closed(self.begin(row))

    def sink(self, row: TileRow) -> torch.Tensor:
        assert row.call.sinks is not None
        return row.call.sinks.float()

    def with_sink(self, row: TileRow, parts: list[Part]) -> list[Part]:
        """A sink is one more part: a key whose logit is the sink and whose value is 0."""
        heads, size = row.q.shape[:2], row.call.shape.v_size
        return [*parts, Part(row.q.new_zeros((*heads, size)), self.sink(row).expand(heads))]

    def merge(self, parts: list[Part]) -> Part:
        return merge_sequential(parts) if len(parts) > 1 else parts[0]

    def store(self, result: Part) -> Part:
        return Part(result.out.to(FLOAT_TYPES[self.out].dtype).float(), result.lse)


def accumulate_f16(a: torch.Tensor, p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """a + p v in a float16 accumulator, rounded once a rescale and once a matrix instruction."""
    a = a.half().float()
    for first in range(0, p.shape[-1], MMA_KEYS):
        step = slice(first, first + MMA_KEYS)
        a = (a + torch.einsum("thn,nhd->thd", p[..., step], v[step])).half().float()
    return a
