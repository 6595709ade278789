"""Flash attention in plain torch: tiled online softmax, any plan, on CPU and GPU.

The arithmetic is that of a tensor-core kernel, step by step, so that a plan can be judged where no such
kernel runs: operands in 16 bits, products accumulated in float32, P rounded to 16 bits before the second
product, a running maximum m, denominator l and accumulator a for each row,

    m' = max(m, max_j s_j)    c = exp(m - m')      p_j = exp(s_j - m')
    l = c l + sum_j p_j       a = c a + sum_j p_j v_j

over tiles of `block` keys; where a KV part ends, (a / l, m + ln l) is its partial result, and the parts are
merged by `merge_sequential`. Decode computes one query row at a time, its head group in matrix tiles of
`TILE_ROWS` heads, the last padded; prefill packs `QUERY_TILE` rows of all heads of a group into one tile.
Several query tokens of a sequence are computed together where the parts of their rows begin at the same keys,
so that each row still follows the plan of its own n_kv. A row that lists its keys goes through those alone,
in the list's order. Every product of the paths decode and several has the same shape whatever the batch, the
number of rows or the head groups, so none of them changes a bit.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.cache import as_numbers, through_cache
from verify.kernels.cache_types import AS_GIVEN, LAW_CACHES, CacheSpec
from verify.kernels.call import AttentionPath, Call, Result, Shape
from verify.kernels.capabilities import ALL_FORMS, Capabilities
from verify.kernels.exact import finish_logits
from verify.kernels.exponentials import flushed_exp_
from verify.kernels.kernel import Kernel
from verify.kernels.lengths import unseen_keys
from verify.kernels.merge import Merge, Part, merge_sequential
from verify.kernels.numbers import FLOAT_TYPES, FP8_TYPES, MMA_KEYS, P_SCALES, U_F32, type_of
from verify.kernels.plans.asked import RowAsked
from verify.kernels.plans.plan import rows_of_like_cuts
from verify.kernels.plans.tile_options import AS_GIVEN_Q, BLOCKS_Q, TileOptions
from verify.kernels.sequences import CallSequence, listed_rows
from verify.kernels.stored import store
from verify.kernels.trace import Launched, RowKind, Signature

# Rows of a matrix tile on the decode path; of one on the prefill path they are a multiple of it.
TILE_ROWS = 4
# Rows of a matrix tile that takes the place of some of those, where that moves no bit.
_WIDEST_TILE = 64
QUERY_TILE = 64
# Types of P in which everything below float32's normal numbers is 0.
_FLUSHES = frozenset({"f16", *FP8_TYPES})
# Floats of partial results held at once. A fixed rule of the shapes, so that no bit depends on free memory.
_PARTIALS_AT_ONCE = 1 << 24
# Slices of matrix tiles that are stored one after another.
_MOST_RUNS = 8


@cache
def source_hash() -> str:
    """Hash of the code that runs, masks of `exact` and gathered pages included: the `binary` of a kernel that
    is interpreted."""
    names = ("eager.py", "merge.py", "exact.py", "sequences.py")
    sources = [Path(__file__).with_name(name) for name in names]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]


class EagerKernel(Kernel):
    """`eager`, and `flash` where its CUDA kernel cannot run."""

    as_if_alone = True

    def __init__(self, spec: str, options: TileOptions, cache: CacheSpec = AS_GIVEN) -> None:
        super().__init__(spec)
        self.options = options
        self.cache = cache

    def run(self, call: Call) -> Result:
        cache = self.cache.at(call.layer)
        stored = None if cache.as_given else store(call, cache)
        result = self._run(call if stored is None else stored.call, cache)
        out = result.out if stored is None else stored.undone(result.out)
        if self.options.out != "f32":
            out = out.to(FLOAT_TYPES[self.options.out].dtype).float()
        return Result(out, result.lse, result.launched)

    def _run(self, call: Call, cache: CacheSpec) -> Result:
        """Attention in float32 over what a cache holds; cache: what it is called in the trace."""
        options, shape = self.options.with_plan(call.plan), call.shape
        if options.q != AS_GIVEN_Q:
            call = replace(call, q=rounded_queries(call.q, options.q))
        if options.plan.policy is None:
            options.plan.groups(shape.ratio)  # raises before anything is computed
        out = call.q.new_zeros((*call.q.shape[:3], shape.v_size), dtype=torch.float32)
        lse = call.q.new_full(call.q.shape[:3], -math.inf, dtype=torch.float32)
        ran: Counter[RowKind] = Counter()
        for sequence in listed_rows(call):
            ran.update(self._sequence(call, options, sequence, out[sequence.at], lse[sequence.at], cache))
        return Result(out, lse, Launched(ran))

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        cache = self.cache.at(None)
        return self._arithmetic(self.options, shape, shape.asked(path, cache.k), cache, torch.float16)

    def arithmetic_of(self, call: Call) -> Arithmetic:
        options, cache = self.options.with_plan(call.plan), self.cache.at(call.layer)
        return self._arithmetic(options, call.shape, call.asked(cache.k), cache, call.q.dtype)

    def _arithmetic(
        self, options: TileOptions, shape: Shape, row: RowAsked, cache: CacheSpec, dtype: torch.dtype
    ) -> Arithmetic:
        plain = Arithmetic(
            p=options.p,
            out=options.out,
            acc=options.acc,
            u=U_F32,
            block=options.plan.block,
            cuts_at=options.plan.cuts_of(row),
            # A prefill tile is cut for its longest row, which may be any row of the call.
            shared_up_to=shape.keys if row.prefill else 0,
        )
        return with_fp8(over_rotation(plain, cache, shape, dtype), options)

    def capabilities(self) -> Capabilities:
        return replace(over_cache(self.options, self.cache), **ALL_FORMS)

    def called(self, label: str) -> str:
        """What traces call it, with everything that its arithmetic depends on."""
        return f"eager[{label}]"

    def merger(self) -> Merge:
        return merge_sequential

    def _sequence(
        self,
        call: Call,
        options: TileOptions,
        sequence: CallSequence,
        out: torch.Tensor,
        lse: torch.Tensor,
        kept: CacheSpec,
    ) -> Counter[RowKind]:
        """One sequence; out [T, Hq, Dv] and lse [T, Hq] are written in place. Returns the number of rows of
        each kind; kept: the cache that they name."""
        ran: Counter[RowKind] = Counter()
        shape, block = call.shape, options.plan.block
        n_kv = sequence.n_kv
        # Of rows that list their keys each sees all that is held.
        unseen: tuple[slice, ...] = ()
        if sequence.positions is None:
            unseen = unseen_keys(sequence.lengths, len(sequence.k), call.sliding_window)
        keys = _tiles(sequence.k, block, unseen).transpose(2, 3).contiguous()  # [Hkv, tiles, Dk, block]
        values = _tiles(sequence.v, block, unseen)  # [Hkv, tiles, block, Dv]
        # Rows that follow the same head groups are launched together, in ascending n_kv.
        by_groups: dict[tuple[int, ...], list[int]] = {}
        cache = "" if kept.as_given else f",cache={kept},expand=f16"
        kernel = self.called(f"{options.label}{cache}")
        asked = call.asked(kept.k)
        count = len(n_kv)
        if call.path == "decode":
            tiles = [[row] for row in range(count)]
        elif call.path == "several":
            tiles = rows_of_like_cuts(options.plan, asked, n_kv)
        else:
            tiles = [list(range(t, min(t + QUERY_TILE, count))) for t in range(0, count, QUERY_TILE)]
        tiles.sort(key=lambda rows: max(n_kv[row] for row in rows))
        tile_n_kv = [max(n_kv[row] for row in rows) for rows in tiles]
        plans = options.plan.of_lengths(asked, tuple(tile_n_kv))
        signatures: dict[tuple[Any, Any], Signature] = {}
        for i, n in enumerate(tile_n_kv):
            by_groups.setdefault(plans[n].head_groups, []).append(i)
        tile_rows = QUERY_TILE if call.path == "prefill" else max(map(len, tiles), default=1)
        for head_groups, members in by_groups.items():
            most_parts = max(max(len(plans[tile_n_kv[i]].cuts) - 1, 1) for i in members)
            floats_a_tile = most_parts * tile_rows * shape.q_heads * shape.v_size
            at_once = max(_PARTIALS_AT_ONCE // floats_a_tile, 1)
            for start in range(0, len(members), at_once):
                chosen = members[start : start + at_once]
                padded = [[*tiles[tile], *[-1] * (tile_rows - len(tiles[tile]))] for tile in chosen]
                rows = torch.tensor(padded, dtype=torch.int64, device=call.q.device)
                cuts = [plans[tile_n_kv[i]].cuts for i in chosen]
                first_head = 0
                launches = []
                for group in head_groups:
                    heads = _heads(shape, first_head, group, call.q.device)
                    done = _launch(call, options, self.merger(), sequence, rows, cuts, heads, keys, values)
                    live = rows.flatten() >= 0
                    at = rows.flatten()[live][:, None], heads.flatten()
                    out[at] = done.result.out[live]
                    lse[at] = done.result.lse[live]
                    launches.append(done)
                    first_head += group
                for i, tile in enumerate(chosen):
                    for closed, groups in _groups_by_bounds(launches, i).items():
                        for row in tiles[tile]:
                            bounds = closed
                            if call.path == "several":
                                # The last part ends with the row's own keys.
                                bounds = (*closed[:-1], n_kv[row])
                            # However a plan would launch them: here head groups are computed in turn.
                            of = tuple(groups), bounds
                            if of not in signatures:
                                signatures[of] = Signature(
                                    kernel=kernel,
                                    binary=source_hash(),
                                    head_groups=of[0],
                                    cuts=bounds,
                                    launch="one",
                                )
                            ran[call.path, n_kv[row], signatures[of]] += 1
        return ran


def over_cache(options: TileOptions, cache: CacheSpec) -> Capabilities:
    """What `eager` and `flash` have with such a cache, on whichever device."""
    return Capabilities(
        caches=LAW_CACHES,
        ratios=options.plan.ratios,
        size_multiple=cache.size_multiple,
        # A scale of all keys makes of a row alone another cache than of the row in a batch.
        row_alone=not cache.looks_ahead,
    )


def over_rotation(plain: Arithmetic, cache: CacheSpec, shape: Shape, dtype: torch.dtype) -> Arithmetic:
    """An arithmetic on rotated keys and values: q is rounded to its own type once more."""
    blocks = cache.blocks(shape.k_size, shape.v_size)
    if not blocks.k and not blocks.v:
        return plain
    kind = type_of(dtype)
    u_q = (U_F32 if kind is None or kind.name == "f32" else kind.u) if blocks.k else 0.0
    return replace(plain, u_q=plain.u_q + u_q, k_rotation=blocks.k, v_rotation=blocks.v)


def with_fp8(plain: Arithmetic, options: TileOptions) -> Arithmetic:
    """An arithmetic with P, or q, of 8 bits, where options ask for it."""
    if options.q == BLOCKS_Q:
        plain = replace(plain, q_blocks=True)
    elif options.q in FP8_TYPES:
        # Its code, and the product of code and scale in float16 or better.
        plain = replace(plain, u_q=plain.u_q + FP8_TYPES[options.q].u + 2.0**-11, q_scaled=options.q)
    return replace(plain, p_scale=P_SCALES.get(options.p, 1.0))


def rounded_queries(q: torch.Tensor, kind: str) -> torch.Tensor:
    """q [B, T, Hq, D] as codes of 8 bits stand for it, with one scale a row and head or in blocks."""
    return through_cache(q, kind, scale="" if kind == BLOCKS_Q else "token")


class _Launch(NamedTuple):
    """What one head group's launch gave, and what it did.

    result: out [N*t, Hkv*g, Dv] and lse [N*t, Hkv*g] of N matrix tiles of t rows; heads: g; closed: of each
    matrix tile the bounds of the parts that were closed, counted as they were.
    """

    result: Part
    heads: int
    closed: list[tuple[int, ...]]


def _groups_by_bounds(launches: Sequence[_Launch], tile: int) -> dict[tuple[int, ...], list[int]]:
    """The head groups that closed the parts of a matrix tile, by the bounds that these parts had: one entry
    where all groups did the same."""
    found: dict[tuple[int, ...], list[int]] = {}
    for launch in launches:
        found.setdefault(launch.closed[tile], []).append(launch.heads)
    return found


def _tiles(x: torch.Tensor, block: int, unseen: Sequence[slice]) -> torch.Tensor:
    """[S, H, D] as float32 tiles [H, ceil(S / block), block, D], the last padded with zeros; zeros too where
    no row sees: whatever a cache holds there, NaN included, weighs nothing."""
    keys, heads, size = x.shape
    tiles = -(-keys // block)
    padded = x.new_zeros((tiles * block, heads, size), dtype=torch.float32)
    padded[:keys] = x
    for keys_of_none in unseen:
        padded[keys_of_none] = 0.0
    return padded.view(tiles, block, heads, size).permute(2, 0, 1, 3).contiguous()


def _heads(shape: Shape, first: int, group: int, device: torch.device) -> torch.Tensor:
    """Query heads first .. first+group-1 of every KV head: [Hkv, group]."""
    base = torch.arange(shape.kv_heads, device=device)[:, None] * shape.ratio
    return base + torch.arange(first, first + group, device=device)


def _launch(
    call: Call,
    options: TileOptions,
    merge: Merge,
    sequence: CallSequence,
    rows: torch.Tensor,
    cuts: list[tuple[int, ...]],
    heads: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> _Launch:
    """One head group of every KV head over some matrix tiles of query rows.

    rows [N, t]: row numbers of each matrix tile, -1 where it is padded, tiles in ascending n_kv;
    cuts: KV part bounds of each tile; heads [Hkv, g].
    """
    n, t = rows.shape
    kv_heads, g = heads.shape
    block, size = options.plan.block, call.shape.v_size
    device = call.q.device
    p_scale = P_SCALES.get(options.p, 1.0)
    # What is flushed would be 0 in P, and is no bit of l, to which the largest logit gives 1.
    flushes = options.p in _FLUSHES
    used = t * g
    height = -(-used // TILE_ROWS) * TILE_ROWS
    tile = height if call.path == "prefill" else TILE_ROWS
    its_rows = rows.clamp(min=0)
    visible = torch.where(rows >= 0, sequence.kv_len.long()[its_rows], 0)  # [N, t]
    q = call.q.new_zeros((kv_heads, n, height, call.shape.k_size), dtype=torch.float32)
    gathered = sequence.q[its_rows][:, :, heads]  # [N, t, Hkv, g, Dk]
    q[:, :, :used] = gathered.permute(2, 0, 1, 3, 4).reshape(kv_heads, n, used, -1)

    m = q.new_full((kv_heads, n, used), -math.inf)
    l = torch.zeros_like(m)
    a = q.new_zeros((kv_heads, n, used, size))
    most_parts = max(max(len(c) - 1 for c in cuts), 1)
    outs = q.new_zeros((most_parts, kv_heads, n, used, size))
    lses = q.new_full((most_parts, kv_heads, n, used), -math.inf)
    last_tile = [-(-c[-1] // block) for c in cuts]
    # Tiles at which a part of matrix tile i begins (the first part excepted), and which part ends there.
    begins: dict[int, list[tuple[int, int]]] = {}
    for i, c in enumerate(cuts):
        for part, bound in enumerate(c[1:-1]):
            begins.setdefault(bound // block, []).append((i, part))
    # What is done, counted as it is done: keys that the running results of each matrix tile have gone
    # through, and the bounds at which they were stored.
    longest = [c[-1] for c in cuts]
    passed = np.zeros(n, dtype=np.int64)
    closed: list[list[int]] = [[0] for _ in range(n)]

    def close(ending: Sequence[tuple[int, int]]) -> None:
        """Store the running results of some matrix tiles, each as one of its parts, and start anew."""
        for i, part in _runs(ending, device):
            li, mi = l[:, i], m[:, i]
            empty = li == 0
            o = a[:, i] / (torch.where(empty, 1.0, li) * p_scale)[..., None]
            outs[part, :, i] = o if isinstance(part, int) else o.transpose(0, 1)
            lse = torch.where(empty, -math.inf, mi + torch.log(li))
            lses[part, :, i] = lse if isinstance(part, int) else lse.transpose(0, 1)
            m[:, i], l[:, i], a[:, i] = -math.inf, 0.0, 0.0
        for matrix_tile, _ in ending:
            if longest[matrix_tile]:
                closed[matrix_tile].append(min(int(passed[matrix_tile]), longest[matrix_tile]))

    positions = _padded_positions(sequence, block)
    # Held from tile to tile: logits, and P with zeros where a matrix tile is padded.
    logits, weights = (q.new_zeros((kv_heads, n, height, block)) for _ in range(2))
    # The first keys that every row of a matrix tile and of those after it sees: there nothing is hidden.
    seen_by_all = [0] * n
    if sequence.positions is None and not _hides_more(call):
        seen_by_all = visible.amin(1).flip(0).cummin(0).values.flip(0).tolist()
    for j in range(max(last_tile)):
        if j in begins:
            close(begins[j])
        # Tiles are in ascending n_kv: those that still see keys are the last ones.
        active = slice(next(i for i, end in enumerate(last_tile) if end > j), n)
        for h in range(kv_heads):
            _product(q[h, active], keys[h, j], logits[h, active], tile)
        s = logits[:, active, :used].mul_(call.scale)
        # Those after them see the whole tile.
        some = slice(active.start, bisect.bisect_left(seen_by_all, (j + 1) * block, lo=active.start))
        if some.start < some.stop:
            its = s[:, : some.stop - some.start]
            hidden = its.reshape(kv_heads, -1, g, block)
            group_call = _of_heads(call, heads)
            own = slice(j * block, min((j + 1) * block, len(sequence.k)))
            mask = sequence.mask_of(its_rows[some].reshape(-1), own, heads, kv_heads=kv_heads)
            if mask is not None:
                # The rest of the last tile is hidden as what lies beyond a row's keys is.
                mask = torch.nn.functional.pad(mask, (0, block - mask.shape[-1]))
            at = positions[j * block : (j + 1) * block]
            hidden = finish_logits(hidden, visible[some].reshape(-1), at, group_call, mask)
            its.copy_(hidden.view(its.shape))
        m_old = m[:, active]
        m_new = torch.maximum(m_old, s.amax(-1))
        shift = torch.where(torch.isneginf(m_new), 0.0, m_new)
        p = s.sub_(shift[..., None])
        p = flushed_exp_(p) if flushes else p.exp_()
        rescale = torch.exp(m_old - shift)
        l[:, active] = l[:, active] * rescale + p.sum(-1)
        m[:, active] = m_new
        # P of 8 bits fills its type: a power of two that the accumulator carries, and the part's end undoes.
        padded = weights[:, active]
        padded[:, :, :used] = as_numbers(p.mul_(p_scale) if p_scale != 1.0 else p, options.p)
        _accumulate(a[:, active], rescale, padded, values[:, j], options.acc, tile)
        passed[active] = (j + 1) * block
    close([(i, max(len(c) - 2, 0)) for i, c in enumerate(cuts)])
    parts = [Part(o, x) for o, x in zip(outs, lses, strict=True)]
    if call.sinks is not None:
        # A sink is one more part: a key whose logit is the sink and whose value is 0.
        sink = call.sinks.float()[heads].view(kv_heads, 1, 1, g).expand(kv_heads, n, t, g)
        parts.append(Part(torch.zeros_like(outs[0]), sink.reshape(kv_heads, n, used)))
    result = merge(parts) if len(parts) > 1 else parts[0]
    merged_out = result.out.view(kv_heads, n * t, g, size).transpose(0, 1)
    merged_lse = result.lse.view(kv_heads, n * t, g).transpose(0, 1)
    merged = Part(merged_out.reshape(n * t, kv_heads * g, size), merged_lse.reshape(n * t, kv_heads * g))
    return _Launch(merged, g, [tuple(bounds) for bounds in closed])


def _runs(
    ending: Sequence[tuple[int, int]], device: torch.device
) -> list[tuple[slice | torch.Tensor, int | torch.Tensor]]:
    """Matrix tiles and the part of each, (tile, part) by (tile, part), as slices of tiles with one part where
    those are few, which are read and written where they lie; else as numbers."""
    runs: list[tuple[slice, int]] = []
    for i, part in ending:
        if runs and runs[-1][0].stop == i and runs[-1][1] == part:
            runs[-1] = slice(runs[-1][0].start, i + 1), part
        else:
            runs.append((slice(i, i + 1), part))
    if len(runs) <= _MOST_RUNS:
        return list(runs)
    which = torch.tensor(ending, device=device)
    return [(which[:, 0], which[:, 1])]


def _hides_more(call: Call) -> bool:
    """Whether logits are changed, or keys hidden, by more than a row's length."""
    given = (call.softcap, call.alibi_slopes, call.sliding_window, call.mask)
    return any(option is not None for option in given)


def _padded_positions(sequence: CallSequence, block: int) -> torch.Tensor:
    """The places of a sequence's keys, in whole tiles: beyond its last key none that a row sees."""
    keys, device = len(sequence.k), sequence.k.device
    if sequence.positions is None:
        return torch.arange(-(-keys // block) * block, device=device)
    return torch.nn.functional.pad(sequence.positions, (0, -keys % block), value=2**31 - 1)


def _of_heads(call: Call, heads: torch.Tensor) -> Call:
    """The call with its ALiBi slopes narrowed to these heads."""
    if call.alibi_slopes is None:
        return call
    return replace(call, alibi_slopes=call.alibi_slopes[heads].flatten())


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tile: int) -> None:
    """out [N, height, n] = a [N, height, k] @ b [k, n], `tile` rows at a time: height is a multiple of it."""
    rows, results = a.flatten(0, 1), out.view(-1, b.shape[-1])
    first = 0
    if tile == TILE_ROWS and not a.is_cuda:
        wide = _wide_tile(*b.shape)
        first = len(rows) // wide * wide
        if first:
            _by_tiles(rows[:first], b, results[:first], wide)
    if first < len(rows):
        _by_tiles(rows[first:], b, results[first:], tile)


def _by_tiles(rows: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tile: int) -> None:
    tiles = rows.unflatten(0, (-1, tile))
    torch.bmm(tiles, b.expand(len(tiles), -1, -1), out=out.view(*tiles.shape[:2], b.shape[-1]))


@cache
def _wide_tile(k: int, n: int) -> int:
    """Rows of the widest matrix tile in which every row has the bits that it has in one of `TILE_ROWS`, which
    takes twice the time: products [rows, k] @ [k, n] on this CPU are asked. Libraries choose how they sum by
    the shape."""
    drawn = torch.Generator().manual_seed(0)
    a = torch.randn((2 * _WIDEST_TILE, k), generator=drawn)
    b = torch.randn((k, n), generator=drawn)
    due, found = (a.new_empty((len(a), n)) for _ in range(2))
    _by_tiles(a, b, due, TILE_ROWS)
    wide = _WIDEST_TILE
    while wide > TILE_ROWS:
        _by_tiles(a, b, found, wide)
        alike = torch.equal(found, due)
        # One tile by itself may be cut up for threads.
        _by_tiles(a[:wide], b, found[:wide], wide)
        if alike and torch.equal(found[:wide], due[:wide]):
            break
        wide //= 2
    return wide


def _accumulate(
    a: torch.Tensor, rescale: torch.Tensor, p: torch.Tensor, values: torch.Tensor, acc: str, tile: int
) -> None:
    """a = rescale * a + p @ values for one tile of keys, in place, in matrix tiles of `tile` rows.

    a [Hkv, N, used, Dv]; rescale [Hkv, N, used]; p [Hkv, N, height, block]; values [Hkv, block, Dv].
    """
    kv_heads, count, height, block = p.shape
    used = a.shape[2]
    grown = a.mul_(rescale[..., None])
    product = p.new_empty((kv_heads, count, height, values.shape[-1]))
    if acc == "f32":
        for h in range(kv_heads):
            _product(p[h], values[h], product[h], tile)
        grown.add_(product[:, :, :used])
        return
    grown = grown.half()
    for first in range(0, block, MMA_KEYS):
        step = slice(first, first + MMA_KEYS)
        for h in range(kv_heads):
            _product(p[h, :, :, step], values[h, step], product[h], tile)
        grown = (grown.float() + product[:, :, :used]).half()
    a.copy_(grown)
