"""Flash attention in plain torch: tiled online softmax, any plan, on CPU and GPU.

The arithmetic is that of a tensor-core kernel, step by step, so that a plan can be judged where no such
kernel runs: operands in 16 bits, products accumulated in float32, P rounded to 16 bits before the second
product, a running maximum m, denominator l and accumulator a for each row,

    m' = max(m, max_j s_j)    c = exp(m - m')      p_j = exp(s_j - m')
    l = c l + sum_j p_j       a = c a + sum_j p_j v_j

over tiles of `block` keys; where a KV part ends, (a / l, m + ln l) is its partial result, and the parts are
merged by `merge_sequential`. Decode computes one query row at a time, its head group in matrix tiles of
`TILE_ROWS` heads, the last padded, or in products of any height where that moves no bit; prefill packs
`QUERY_TILE` rows of all heads of a group into one tile. Several query tokens of a sequence are computed
together where the parts of their rows begin at the same keys, so that each row still follows the plan of its
own n_kv. A row that lists its keys goes through those alone, in the list's order. Every product of the paths
decode and several has the same shape whatever the batch, the number of rows or the head groups, or its shape
moves no bit: so none of them changes one.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
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
from verify.kernels.plans.plan import Plan, rows_of_like_cuts
from verify.kernels.plans.tile_options import AS_GIVEN_Q, BLOCKS_Q, TileOptions
from verify.kernels.sequences import CallSequence, listed_rows
from verify.kernels.stored import store
from verify.kernels.trace import Launched, RowKind, Signature

# Rows of a matrix tile on the decode path; of one on the prefill path they are a multiple of it.
TILE_ROWS = 4
# Rows of the products that are asked whether their number moves a bit, and the most that there are: past any
# tile of a library in steps of an odd number.
_MOST_ROWS = 2048
_HEIGHTS_ASKED = (*range(1, 100), *range(101, _MOST_ROWS, 197), _MOST_ROWS)
QUERY_TILE = 64
# Types of P in which everything below float32's normal numbers is 0.
_FLUSHES = frozenset({"f16", *FP8_TYPES})
# Floats of partial results held at once, and of a tile's logits, for a CPU's caches. Fixed rules of the
# shapes, so that no bit depends on free memory.
_PARTIALS_AT_ONCE, _LOGITS_AT_ONCE = 1 << 24, 1 << 17
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
        launched: list[Launched] = []
        for sequence in listed_rows(call):
            launched += self._sequence(call, options, sequence, out[sequence.at], lse[sequence.at], cache)
        return Result(out, lse, _together(tuple(launched)))

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
    ) -> list[Launched]:
        """One sequence; out [T, Hq, Dv] and lse [T, Hq] are written in place. Returns what was launched for
        some rows each; kept: the cache that they name."""
        block = options.plan.block
        # Of rows that list their keys each sees all that is held.
        unseen: tuple[slice, ...] = ()
        if sequence.positions is None:
            unseen = unseen_keys(sequence.lengths, len(sequence.k), call.sliding_window)
        keys = _tiles(sequence.k, block, unseen, transposed=True)  # [Hkv, tiles, Dk, block]
        values = _tiles(sequence.v, block, unseen)  # [Hkv, tiles, block, Dv]
        cache = "" if kept.as_given else f",cache={kept},expand=f16"
        kernel = self.called(f"{options.label}{cache}")
        course = _course(options.plan, call.asked(kept.k), call.path, sequence.n_kv, call.q.device)
        launched = []
        for together in course:
            rows, live, padded = together.rows, together.live, together.padded
            first_head = 0
            launches = []
            for group in together.head_groups:
                heads = _heads(call.shape, first_head, group, call.q.device)
                done = _launch(
                    call, options, self.merger(), sequence, rows, together.cuts, heads, keys, values
                )
                at = live[:, None], heads.flatten()
                out[at] = done.result.out[padded] if padded is not None else done.result.out
                lse[at] = done.result.lse[padded] if padded is not None else done.result.lse
                launches.append((group, done.closed.tobytes()))
                first_head += group
            launched.append(_rows_launched(kernel, call.path, together.n_kv, tuple(launches)))
        return launched


class _Together(NamedTuple):
    """Matrix tiles of query rows that are launched together, since they follow the same head groups."""

    head_groups: tuple[int, ...]  # of every one of them
    rows: torch.Tensor  # [N, t], row numbers of each matrix tile, -1 where it is padded; ascending n_kv
    live: torch.Tensor  # the row numbers, one after another, without the padding
    padded: torch.Tensor | None  # where they lie among the N * t; None: there is no padding
    cuts: tuple[tuple[int, ...], ...]  # KV part bounds of each matrix tile
    n_kv: tuple[tuple[int, ...], ...]  # keys that each row of each matrix tile goes through


@lru_cache(maxsize=64)
def _course(
    plan: Plan, asked: RowAsked, path: AttentionPath, n_kv: tuple[int, ...], device: torch.device
) -> list[_Together]:
    """How the rows of one sequence are computed; n_kv: keys that each goes through. A model asks the same at
    every layer."""
    count = len(n_kv)
    if path == "decode":
        tiles = [[row] for row in range(count)]
    elif path == "several":
        tiles = rows_of_like_cuts(plan, asked, n_kv)
    else:
        tiles = [list(range(t, min(t + QUERY_TILE, count))) for t in range(0, count, QUERY_TILE)]
    tiles.sort(key=lambda rows: max(n_kv[row] for row in rows))
    tile_n_kv = [max(n_kv[row] for row in rows) for rows in tiles]
    plans = plan.of_lengths(asked, tuple(tile_n_kv))
    # Rows that follow the same head groups are launched together, in ascending n_kv.
    by_groups: dict[tuple[int, ...], list[int]] = {}
    for i, n in enumerate(tile_n_kv):
        by_groups.setdefault(plans[n].head_groups, []).append(i)
    tile_rows = QUERY_TILE if path == "prefill" else max(map(len, tiles), default=1)
    found = []
    for head_groups, members in by_groups.items():
        most_parts = max(max(len(plans[tile_n_kv[i]].cuts) - 1, 1) for i in members)
        at_once = max(_PARTIALS_AT_ONCE // (most_parts * tile_rows * asked.q_heads * asked.v_size), 1)
        if path != "prefill" and device.type == "cpu":
            rows_at_once = min(_LOGITS_AT_ONCE // (asked.q_heads * plan.block), _MOST_ROWS // asked.ratio)
            at_once = min(at_once, max(rows_at_once // tile_rows, 1))
        for start in range(0, len(members), at_once):
            chosen = members[start : start + at_once]
            padded = [[*tiles[tile], *[-1] * (tile_rows - len(tiles[tile]))] for tile in chosen]
            rows = torch.tensor(padded, dtype=torch.int64, device=device)
            live = rows.flatten() >= 0
            found.append(
                _Together(
                    head_groups=head_groups,
                    rows=rows,
                    live=rows.flatten()[live],
                    padded=None if bool(live.all()) else live.nonzero()[:, 0],
                    cuts=tuple(plans[tile_n_kv[i]].cuts for i in chosen),
                    n_kv=tuple(tuple(n_kv[row] for row in tiles[i]) for i in chosen),
                )
            )
    return found


@lru_cache(maxsize=256)
def _rows_launched(
    kernel: str,
    path: AttentionPath,
    n_kv: tuple[tuple[int, ...], ...],
    launches: tuple[tuple[int, bytes], ...],
) -> Launched:
    """The rows of some matrix tiles by kind. n_kv: of each row of each tile; launches: heads of each group,
    and `_Launch.closed` as its bytes. What was counted alike is the same object."""
    ran: Counter[RowKind] = Counter()
    signatures: dict[tuple[Any, Any], Signature] = {}
    closed = [(heads, np.frombuffer(told, np.int64).reshape(len(n_kv), -1)) for heads, told in launches]
    for tile, its_rows in enumerate(n_kv):
        # The head groups that closed its parts, by the bounds that these parts had: one entry where all
        # groups did the same.
        by_bounds: dict[tuple[int, ...], list[int]] = {}
        for heads, bounds in closed:
            its = bounds[tile]
            by_bounds.setdefault(tuple(its[its >= 0].tolist()), []).append(heads)
        for told, groups in by_bounds.items():
            for n in its_rows:
                # Of several rows the last part ends with each row's own keys.
                of = tuple(groups), (*told[:-1], n) if path == "several" else told
                if of not in signatures:
                    # However a plan would launch them: here head groups are computed in turn.
                    signatures[of] = Signature(
                        kernel=kernel, binary=source_hash(), head_groups=of[0], cuts=of[1], launch="one"
                    )
                ran[path, n, signatures[of]] += 1
    return Launched(ran)


@lru_cache(maxsize=64)
def _together(several: tuple[Launched, ...]) -> Launched:
    """What several launches ran, as one: the same object for the same ones."""
    return several[0] if len(several) == 1 else Launched.together(several)


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

    result: out [N*t, Hkv*g, Dv] and lse [N*t, Hkv*g] of N matrix tiles of t rows; closed [N, parts + 1]
    int64: of each matrix tile the bounds of the parts that were closed, counted as they were, and -1 after.
    """

    result: Part
    closed: np.ndarray


def _tiles(x: torch.Tensor, block: int, unseen: Sequence[slice], *, transposed: bool = False) -> torch.Tensor:
    """[S, H, D] as float32 tiles [H, ceil(S / block), block, D], or [..., D, block] where transposed, the
    last padded with zeros; zeros too where no row sees: whatever a cache holds there, NaN included, weighs
    nothing."""
    keys, heads, size = x.shape
    tiles, whole = -(-keys // block), keys // block
    found = x.new_empty(
        (heads, tiles, *((size, block) if transposed else (block, size))), dtype=torch.float32
    )
    # One pass: as they are called for, whichever way they lie.
    by_key = found.transpose(2, 3) if transposed else found
    by_key[:, :whole] = x[: whole * block].unflatten(0, (whole, block)).permute(2, 0, 1, 3)
    if whole < tiles:
        rest = keys - whole * block
        by_key[:, whole, :rest], by_key[:, whole, rest:] = x[whole * block :].transpose(0, 1), 0.0
    for none in unseen:
        for tile in range(none.start // block, -(-none.stop // block)):
            first = tile * block
            by_key[:, tile, max(none.start - first, 0) : none.stop - first] = 0.0
    return found


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
    cuts: Sequence[tuple[int, ...]],
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
    # Matrix tiles need not be where the number of rows moves no bit.
    packs = call.path != "prefill" and not call.q.is_cuda and _packs(options, call.shape.k_size, size)
    height = used if packs else -(-used // TILE_ROWS) * TILE_ROWS
    tile = height if call.path == "prefill" else TILE_ROWS
    its_rows = rows.clamp(min=0)
    visible = torch.where(rows >= 0, sequence.kv_len.long()[its_rows], 0)  # [N, t]
    q = call.q.new_zeros((kv_heads, n, height, call.shape.k_size), dtype=torch.float32)
    gathered = sequence.q[its_rows][:, :, heads]  # [N, t, Hkv, g, Dk]
    q[:, :, :used] = gathered.permute(2, 0, 1, 3, 4).reshape(kv_heads, n, used, -1)

    m = q.new_full((kv_heads, n, used), -math.inf)
    l = torch.zeros_like(m)
    a = q.new_zeros((kv_heads, n, used, size))
    steps = _steps(tuple(cuts), block, device)
    outs, lses = q.new_zeros(()), q.new_zeros(())
    if steps.most_parts > 1:
        outs = q.new_zeros((steps.most_parts, kv_heads, n, used, size))
        lses = q.new_full((steps.most_parts, kv_heads, n, used), -math.inf)
    # What is done, counted as it is done: keys that the running results of each matrix tile have gone
    # through, and the bounds at which they were stored.
    passed = np.zeros(n, dtype=np.int64)
    closed = np.full((n, steps.most_parts + 1), -1, dtype=np.int64)
    closed[:, 0] = 0
    parts_closed = np.zeros(n, dtype=np.int64)

    def close(ending: _Ending) -> None:
        """Store the running results of some matrix tiles, each as one of its parts, and start anew."""
        for i, part in ending.runs:
            o, lse = partial_result(i)
            outs[part, :, i] = o if isinstance(part, int) else o.transpose(0, 1)
            lses[part, :, i] = lse if isinstance(part, int) else lse.transpose(0, 1)
            if ending is not steps.end:
                m[:, i], l[:, i], a[:, i] = -math.inf, 0.0, 0.0
        count(ending)

    def partial_result(i: slice | torch.Tensor) -> Part:
        """What the parts at hand of some matrix tiles come to."""
        li = l[:, i]
        # Of a part of which nothing is seen l is 0 and m -inf.
        o = a[:, i] / (torch.where(li == 0, 1.0, li) * p_scale)[..., None]
        return Part(o, torch.log(li).add_(m[:, i]))

    def count(ending: _Ending) -> None:
        parts_closed[ending.seeing] += 1
        ends = np.minimum(passed, steps.longest)[ending.seeing]
        closed[ending.seeing, parts_closed[ending.seeing]] = ends

    positions = _padded_positions(sequence, block)
    # Held from tile to tile: logits, P (of no meaning where a matrix tile is padded), and its products.
    logits = q.new_zeros(kv_heads * n * height * block)
    weights = logits if packs else torch.zeros_like(logits)
    products = q.new_empty(kv_heads * n * height * size)
    # The first keys that every row of a matrix tile and of those after it sees: there nothing is hidden.
    seen_by_all = [0] * n
    if sequence.positions is None and not _hides_more(call):
        seen_by_all = visible.amin(1).flip(0).cummin(0).values.flip(0).tolist()
    for j, first in enumerate(steps.first_active):
        if j in steps.begins:
            close(steps.begins[j])
        active = slice(first, n)
        shape = kv_heads, n - first, height
        both = _filled(logits, (*shape, block))
        _product(q[:, active], keys[:, j], both, None if packs else tile)
        s = both[:, :, :used].mul_(call.scale)
        # Those after them see the whole tile.
        some = slice(active.start, bisect.bisect_left(seen_by_all, (j + 1) * block, lo=active.start))
        hides = some.stop - some.start
        if hides:
            its = s[:, :hides]
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
        if not flushes:
            p.exp_()
        else:
            # Where keys are hidden e^x underflows, which costs more: by themselves.
            for rows_alike in (p[:, :hides], p[:, hides:]):
                flushed_exp_(rows_alike)
        rescale = torch.exp(m_old - shift)
        l[:, active] = l[:, active] * rescale + p.sum(-1)
        m[:, active] = m_new
        # P of 8 bits fills its type: a power of two that the accumulator carries, and the part's end undoes.
        padded = _filled(weights, (*shape, block))
        padded[:, :, :used] = as_numbers(p.mul_(p_scale) if p_scale != 1.0 else p, options.p)
        product = _filled(products, (*shape, size))
        _accumulate(
            a[:, active], rescale, padded, values[:, j], options.acc, product, None if packs else tile
        )
        passed[active] = (j + 1) * block
    if steps.most_parts > 1:
        close(steps.end)
        parts = [Part(o, x) for o, x in zip(outs, lses, strict=True)]
    else:
        count(steps.end)
        parts = [partial_result(slice(None))]
    if call.sinks is not None:
        # A sink is one more part: a key whose logit is the sink and whose value is 0.
        sink = call.sinks.float()[heads].view(kv_heads, 1, 1, g).expand(kv_heads, n, t, g)
        parts.append(Part(torch.zeros_like(parts[0].out), sink.reshape(kv_heads, n, used)))
    result = merge(parts) if len(parts) > 1 else parts[0]
    merged_out = result.out.view(kv_heads, n * t, g, size).transpose(0, 1)
    merged_lse = result.lse.view(kv_heads, n * t, g).transpose(0, 1)
    merged = Part(merged_out.reshape(n * t, kv_heads * g, size), merged_lse.reshape(n * t, kv_heads * g))
    return _Launch(merged, closed)


class _Ending(NamedTuple):
    """Matrix tiles of which a part ends: as `_runs`, and the numbers of those that see a key."""

    runs: list[tuple[slice | torch.Tensor, int | torch.Tensor]]
    seeing: np.ndarray


class _Steps(NamedTuple):
    """What the cuts of some matrix tiles, in ascending n_kv, say of each tile of keys."""

    first_active: list[int]  # by tile of keys, the first matrix tile that sees keys there: the rest do too
    begins: dict[int, _Ending]  # tiles at which parts begin, the first excepted: what ends there
    end: _Ending  # the last parts of all
    most_parts: int
    longest: np.ndarray  # keys of each matrix tile


@lru_cache(maxsize=256)
def _steps(cuts: tuple[tuple[int, ...], ...], block: int, device: torch.device) -> _Steps:
    longest = np.array([c[-1] for c in cuts], dtype=np.int64)
    last_tile = [-(-c[-1] // block) for c in cuts]
    begins: dict[int, list[tuple[int, int]]] = {}
    for i, c in enumerate(cuts):
        for part, bound in enumerate(c[1:-1]):
            begins.setdefault(bound // block, []).append((i, part))

    def ending(those: Sequence[tuple[int, int]]) -> _Ending:
        which = np.array([i for i, _ in those], dtype=np.int64)
        return _Ending(_runs(those, device), which[longest[which] > 0])

    return _Steps(
        first_active=[bisect.bisect_right(last_tile, j) for j in range(max(last_tile))],
        begins={j: ending(those) for j, those in begins.items()},
        end=ending([(i, max(len(c) - 2, 0)) for i, c in enumerate(cuts)]),
        most_parts=max(max(len(c) - 1 for c in cuts), 1),
        longest=longest,
    )


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


def _filled(held: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The first numbers of memory that is held, in a shape."""
    return held[: math.prod(shape)].view(shape)


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tile: int | None) -> None:
    """out [Hkv, N, height, n] = a [Hkv, N, height, k] @ b [Hkv, k, n], `tile` rows at a time, of which height
    is a multiple; None: all rows of a head at once."""
    rows, results = a.flatten(1, 2), out.flatten(1, 2)
    if tile is None:
        missing = TILE_ROWS - rows.shape[1]
        if missing > 0:
            # A single row would be a product of a vector, whose sums have another order.
            padded = torch.nn.functional.pad(rows, (0, 0, 0, missing))
            results.copy_(torch.bmm(padded, b)[:, :-missing])
        else:
            torch.bmm(rows, b, out=results)
        return
    for its_rows, its_b, its_results in zip(rows, b, results, strict=True):
        _by_tiles(its_rows, its_b, its_results, tile)


@cache
def _packs(options: TileOptions, k_size: int, v_size: int) -> bool:
    """Whether rows of a kernel with these options have, in products of any number of rows, the bits of a
    matrix tile of `TILE_ROWS`."""
    block = options.plan.block
    depth = block if options.acc == "f32" else min(MMA_KEYS, block)
    return _height_moves_no_bit(k_size, block) and _height_moves_no_bit(depth, v_size)


def _by_tiles(rows: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tile: int) -> None:
    tiles = rows.unflatten(0, (-1, tile))
    torch.bmm(tiles, b.expand(len(tiles), -1, -1), out=out.view(*tiles.shape[:2], b.shape[-1]))


@cache
def _height_moves_no_bit(k: int, n: int) -> bool:
    """Whether every row of products [rows, k] @ [k, n] has the bits that it has in one of `TILE_ROWS` rows,
    however many there are and wherever it lies: this CPU is asked, since libraries choose how they sum by the
    shape. Many tiles of few rows take twice the time, and padded ones up to four times."""
    drawn = torch.Generator().manual_seed(0)
    a = torch.randn((_MOST_ROWS, k), generator=drawn)
    b = torch.randn((k, n), generator=drawn)
    due, found = (a.new_empty((len(a), n)) for _ in range(2))
    _by_tiles(a, b, due, TILE_ROWS)
    for by in range(1, TILE_ROWS):
        _by_tiles(a.roll(by, 0), b, found, TILE_ROWS)
        if not torch.equal(found.roll(-by, 0), due):
            return False
    for height in _HEIGHTS_ASKED:
        # From the end too, that each row lies in many places.
        for rows in (slice(0, height), slice(len(a) - height, None)):
            for heads in (1, 2):
                several = a[None, None, rows].expand(heads, -1, -1, -1)
                found = a.new_empty((*several.shape[:3], n))
                _product(several, b.expand(heads, -1, -1), found, None)
                if not torch.equal(found, due[rows].expand_as(found)):
                    return False
    return True


def _accumulate(
    a: torch.Tensor,
    rescale: torch.Tensor,
    p: torch.Tensor,
    values: torch.Tensor,
    acc: str,
    product: torch.Tensor,
    tile: int | None,
) -> None:
    """a = rescale * a + p @ values for one tile of keys, in place; tile: as in `_product`.

    a [Hkv, N, used, Dv]; rescale [Hkv, N, used]; p [Hkv, N, height, block]; values [Hkv, block, Dv]; product:
    memory of the shape [Hkv, N, height, Dv].
    """
    used, block = a.shape[2], p.shape[-1]
    grown = a.mul_(rescale[..., None])
    if acc == "f32":
        _product(p, values, product, tile)
        grown.add_(product[:, :, :used])
        return
    grown = grown.half()
    for first in range(0, block, MMA_KEYS):
        step = slice(first, first + MMA_KEYS)
        _product(p[..., step], values[:, step], product, tile)
        grown = (grown.float() + product[:, :, :used]).half()
    a.copy_(grown)
