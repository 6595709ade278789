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
from verify.kernels.capabilities import ALL_FORMS, Capabilities
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
    batch: int  # where in q it lies
    t: torch.Tensor  # numbers of the rows there, [t]
    n: int  # they see keys 0 .. n-1, or the first n of what they list
    length: int  # kv_len, by which windows and ALiBi go
    q: torch.Tensor  # [t, Hq, Dk] float32
    kv_head: torch.Tensor  # of every query head, [Hq]
    listed: torch.Tensor | None = None  # [n], the keys of a row that lists them
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

    # Nats that are added to the running maximum.
    offset = 0.0

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
        return Capabilities(row_alone=False, **ALL_FORMS)

    def merger(self) -> Merge:
        return lambda parts: self.merge(list(parts))

    def run(self, call: Call) -> Result:
        self.refuse_forms(call)
        shape = call.shape
        ran: Counter[RowKind] = Counter()
        out = call.q.new_zeros((shape.batch, shape.rows, shape.q_heads, shape.v_size), dtype=torch.float32)
        lse = call.q.new_zeros((shape.batch, shape.rows, shape.q_heads), dtype=torch.float32)
        for b, (batch, rows) in enumerate(call.rows_of_sequences()):
            for t in self.like_rows(call, batch, rows):
                listed = None if call.keys is None else self.listed(call.keys[batch, t[0]])
                n_kv = int(call.kv_len[batch, t[0]]) if listed is None else len(listed)
                n = self.visible(call, n_kv)
                plan = self.plan_of(shape, n)
                row = TileRow(
                    call=call,
                    b=self.sequence(call, b),
                    batch=batch,
                    t=t,
                    n=n,
                    length=n if listed is None else int(call.kv_len[batch, t[0]]),
                    q=self.query(call, batch, t),
                    kv_head=self.kv_heads(shape, plan.head_groups),
                    listed=listed,
                )
                result = self.row(row, plan)
                out[batch, t], lse[batch, t] = self.store(result)
                # All heads are computed together: their groups are those that `kv_heads` was given.
                signature = Signature(f"tile[{self.spec}]", "torch", plan.head_groups, row.cuts, "one")
                ran[call.path, n_kv, signature] += len(t)
        return Result(out, lse, Launched(ran))

    # The steps, in the order in which they run.

    def like_rows(self, call: Call, batch: int, rows: slice) -> list[torch.Tensor]:
        """Rows of a sequence that see the same keys, which are computed together."""
        numbers = torch.arange(rows.start, rows.stop)
        if call.keys is not None:
            return list(numbers[:, None])
        lengths = call.kv_len[batch, rows].cpu()
        return [numbers[lengths == n] for n in lengths.unique()]

    def listed(self, keys: torch.Tensor) -> torch.Tensor:
        """The keys of a row that lists them, without holes."""
        return keys[keys >= 0].long()

    def sequence(self, call: Call, b: int) -> int:
        """The number of the sequence whose keys are read."""
        return b

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
        if row.call.block_table is None and row.listed is None:
            found = x[row.b, first:last]
        else:
            found = self.looked_up(x, row, self.places(row, first, last))
        return found.float().index_select(1, row.kv_head.to(x.device))

    def places(self, row: TileRow, first: int, last: int) -> torch.Tensor:
        """Where in its sequence keys first .. last-1 of a row lie; beyond all of its list, nowhere."""
        if row.listed is None:
            return torch.arange(first, last, device=row.q.device)
        beyond = max(last - len(row.listed), 0)
        return torch.nn.functional.pad(row.listed, (0, beyond), value=2**31 - 1)[first:last]

    def looked_up(self, x: torch.Tensor, row: TileRow, places: torch.Tensor) -> torch.Tensor:
        """Keys or values at these places, [n, Hkv, D]."""
        if row.call.block_table is None:
            return x[row.b, places]
        page = x.shape[1]
        return self.in_page(x, self.pages(row, places // page), places % page)

    def pages(self, row: TileRow, entries: torch.Tensor) -> torch.Tensor:
        """The numbers of pages in these places of the row's table."""
        assert row.call.block_table is not None
        return row.call.block_table[row.b, entries].long()

    def in_page(self, x: torch.Tensor, pages: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        return x[pages, inside]

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
        distance = self.places(row, first, first + s.shape[-1]) - (row.length - 1)
        return s + row.call.alibi_slopes.float()[:, None] * distance

    def mask(self, row: TileRow, s: torch.Tensor, first: int) -> torch.Tensor:
        positions = torch.arange(first, first + s.shape[-1], device=s.device)
        hidden, places = positions >= row.n, self.places(row, first, first + s.shape[-1])
        if row.call.sliding_window is not None:
            hidden = hidden | (places < row.length - row.call.sliding_window)
        if row.call.mask is not None:
            mask = self.mask_of(row, row.call.mask)[..., places.clamp(max=row.call.mask.shape[-1] - 1)]
            s = s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.float()
        return s.masked_fill(hidden, -math.inf)

    def mask_of(self, row: TileRow, mask: torch.Tensor) -> torch.Tensor:
        """The mask of a row's tokens, [t, Hq or 1, S]."""
        return mask[row.batch if len(mask) > 1 else 0][:, row.t].transpose(0, 1)

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
        shift = torch.where(torch.isneginf(state.m), 0.0, state.m) + self.offset
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
        return Part(o, torch.where(empty, -math.inf, state.m + self.offset + torch.log(state.l)))

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


def accumulate_f16(a: torch.Tensor, p: torch.Tensor, v: torch.Tensor, step: int = MMA_KEYS) -> torch.Tensor:
    """a + p v in a float16 accumulator, rounded once a rescale and once for every `step` keys."""
    a = a.half().float()
    for first in range(0, p.shape[-1], step):
        keys = slice(first, first + step)
        a = (a + torch.einsum("thn,nhd->thd", p[..., keys], v[keys])).half().float()
    return a
