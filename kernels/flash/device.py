"""The device code of `flash`: one kernel that attends tile by tile, and one that combines KV parts.

Importing this module imports Triton, and Triton decides then whether functions are compiled or interpreted
(TRITON_INTERPRET=1): `verify.kernels.flash` therefore imports it only when a kernel is built for a device
that runs it.

A program of `attend_tiles` handles one head group of one KV head, one KV part, and one matrix tile of M rows:
row i of the tile is query token i // g of the tile and head i % g of the group of g heads. On the decode path
a tile holds one token, on the prefill path M // r tokens. With m the running maximum of the logits in base 2,
l the denominator and a the numerator of a row, over tiles of TILE keys,

    m' = max(m, max_j s_j)    c = 2^(m - m')    p_j = 2^(s_j - m')
    l' = c l + sum_j p_j      a' = c a + sum_j p_j v_j

and a / l, (m + log2 l) ln 2 are the part's result. Everything that depends on head groups, KV cuts or lengths
is a run-time argument that Triton must not specialise on: every grouping and every cut runs the same binary,
which is what makes their results equal to the bit where their cuts are equal.
"""

# Triton's functions are not typed.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """x rounded to nearest-even in TYPE. The interpreter truncates to bfloat16, so there it is done by hand
    and left in float32, which holds the same values."""
    if _INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def product(a, b, acc):
    """acc + a @ b, accumulated in float32. The interpreter cannot multiply bfloat16: it is widened there."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def weighted_values(acc, p, v, V_TYPE: tl.constexpr, P_TYPE: tl.constexpr):
    """acc + P @ V with P rounded to P_TYPE [M, TILE], V [TILE, D] as it is, sums in float32.

    Where the two types differ, the operands are written as sums of bfloat16 numbers, which is exact (float16
    is two of them, float32 three), and their products are added up, smallest first.
    """
    if tl.float32 == V_TYPE:
        return product(narrow(p, P_TYPE).to(tl.float32), v, acc)
    elif P_TYPE == V_TYPE:
        return product(narrow(p, P_TYPE), v, acc)
    else:
        if tl.bfloat16 == V_TYPE:
            v_high = v
        else:
            v_high = narrow(v.to(tl.float32), tl.bfloat16)
            v_low = narrow(v.to(tl.float32) - v_high.to(tl.float32), tl.bfloat16)
        rest = narrow(p, P_TYPE).to(tl.float32)
        p_high = narrow(rest, tl.bfloat16)
        if tl.bfloat16 != P_TYPE:
            rest = rest - p_high.to(tl.float32)
            p_middle = narrow(rest, tl.bfloat16)
            if tl.float32 == P_TYPE:
                p_low = narrow(rest - p_middle.to(tl.float32), tl.bfloat16)
                if tl.bfloat16 != V_TYPE:
                    acc = product(p_low, v_low, acc)
                acc = product(p_low, v_high, acc)
            if tl.bfloat16 != V_TYPE:
                acc = product(p_middle, v_low, acc)
            acc = product(p_middle, v_high, acc)
        if tl.bfloat16 != V_TYPE:
            acc = product(p_high, v_low, acc)
        return product(p_high, v_high, acc)


@triton.jit
def accumulate(acc, rescale, p, v, V_TYPE: tl.constexpr, P_TYPE: tl.constexpr, ACC_F16: tl.constexpr):
    """rescale * acc + P @ V for one tile; with ACC_F16 the sum lives in float16, as some engines keep it."""
    if ACC_F16:
        grown = (acc.to(tl.float32) * rescale[:, None]).to(tl.float16)
        if not _INTERPRETED and tl.float16 == V_TYPE and tl.float16 == P_TYPE:
            return tl.dot(p.to(tl.float16), v, grown, out_dtype=tl.float16)
        else:
            return weighted_values(grown.to(tl.float32), p, v, V_TYPE, P_TYPE).to(tl.float16)
    else:
        return weighted_values(acc * rescale[:, None], p, v, V_TYPE, P_TYPE)


@triton.jit
def tanh(x):
    """tanh to a relative 2^-19: its series below 0.25, exponentials elsewhere."""
    y = tl.minimum(tl.abs(x), 15.0)
    square = y * y
    series = y * (
        1 + square * (-0.33333334 + square * (0.13333334 + square * (-0.053968254 + square * 0.021869488)))
    )
    tail = 1 - 2 / (tl.exp(2 * y) + 1)
    size = tl.where(y < 0.25, series, tail)
    return tl.where(x < 0, -size, size)


@triton.jit
def part_bounds(n_kv, part, parts, tiles_a_part, BLOCK: tl.constexpr):
    """First key, end and number of parts of a row with n_kv keys: `KVCuts.cuts`, in the same integers.

    A part beyond the row's last is empty: its first key and its end are n_kv. tiles_a_part: of parts of a
    given size; below 0 a part has at least so many tiles.
    """
    tiles = (n_kv + BLOCK - 1) // BLOCK
    most = tiles
    if tiles_a_part < 0:
        most = tiles // -tiles_a_part
    count = tl.maximum(tl.minimum(parts, most), 1)
    first, end = part * tiles // count, (part + 1) * tiles // count
    if tiles_a_part > 0:
        count = tl.maximum((tiles + tiles_a_part - 1) // tiles_a_part, 1)
        first, end = part * tiles_a_part, (part + 1) * tiles_a_part
    return tl.minimum(first * BLOCK, n_kv), tl.minimum(end * BLOCK, n_kv), count


@triton.jit(
    do_not_specialize=[
        "tokens",
        "tokens_a_tile",
        "tiles",
        "q_heads",
        "ratio",
        "q_ratio",
        "q_shift",
        "first_group",
        "n_groups",
        "group_size",
        "same_length",
        "parts",
        "tiles_a_part",
        "slots",
        "logit_scale",
        "softcap",
        "window",
    ],
    do_not_specialize_on_alignment=["groups", "kv_len", "alibi", "lse"],
)
def attend_tiles(
    q,
    k,
    v,
    kv_len,
    groups,
    alibi,
    out,
    lse,
    tokens,
    tokens_a_tile,
    tiles,
    q_heads,
    ratio,
    q_ratio,
    q_shift,
    first_group,
    n_groups,
    group_size,
    same_length,
    parts,
    tiles_a_part,
    slots,
    logit_scale,
    softcap,
    window,
    q_b,
    q_t,
    q_h,
    k_b,
    k_s,
    k_h,
    v_b,
    v_s,
    v_h,
    DK: tl.constexpr,
    DK1: tl.constexpr,
    DK2: tl.constexpr,
    DV: tl.constexpr,
    DV1: tl.constexpr,
    DV2: tl.constexpr,
    V_IS_K: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    DECODE: tl.constexpr,
    P_TYPE: tl.constexpr,
    ACC_F16: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (sequences * tiles, KV heads * n_groups, slots).

    q [B, T, Hkv * q_ratio, DK] with strides q_b, q_t, q_h; k and v [B, S, Hkv, D] likewise, last stride 1.
    kv_len [B, T]: a negative one marks a row that another launch computes; same_length: that of all rows, or
    -1. groups [G, 2]: first head and size of each head group; group_size: that of all groups but the last,
    which holds the rest, or 0. out [B, T, slots, Hq, DV] and lse [B, T, slots, Hq] in float32.
    Head sizes are split into a power of two and a padded rest: DK1 + DK2 >= DK, DV1 + DV2 >= DV.
    """
    if OVERLAP:
        # Launched before the kernel in front of it has finished: wait for its results, then let the next one
        # come forward as well.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile_id = tl.program_id(0)
    # Divisions stand in branches: each costs a tenth of a microsecond before the first load.
    sequence = 0
    if tile_id >= tiles:
        sequence = tile_id // tiles
    # Longest rows first, so that short ones fill the end of the launch.
    tile = tiles - 1 - (tile_id - sequence * tiles)
    kv_head = tl.program_id(1)
    group = first_group
    if n_groups > 1:
        group += kv_head % n_groups
        kv_head = kv_head // n_groups
    part = tl.program_id(2)
    sequence64 = tl.cast(sequence, tl.int64)
    # Head groups and lengths come as numbers where numbers can say them: a load from memory in front of the
    # loads of q and k would cost its latency twice over.
    first_head = group * group_size
    size = tl.minimum(group_size, ratio - first_head)
    if group_size == 0:
        first_head = tl.load(groups + 2 * group)
        size = tl.load(groups + 2 * group + 1)

    i = tl.arange(0, M)
    if DECODE:
        token = tile
        n_kv = same_length
        if same_length < 0:
            n_kv = tl.load(kv_len + sequence64 * tokens + tile)
        if n_kv < 0:
            return
        longest = n_kv
        live = i < size
        head = i
        row = sequence64 * tokens + tile + i * 0
        q_row = q + sequence64 * q_b + tile.to(tl.int64) * q_t + i * 0
    else:
        token = tile * tokens_a_tile + i // size
        head = i % size
        live = (i < tokens_a_tile * size) & (token < tokens)
        row = sequence64 * tokens + token
        lengths = tl.load(kv_len + row, mask=live, other=0)
        longest = tl.max(lengths, 0)
        n_kv = lengths[:, None]
        q_row = q + sequence64 * q_b + token.to(tl.int64) * q_t
    begin, end, count = part_bounds(longest, part, parts, tiles_a_part, BLOCK)
    if WINDOW:
        if DECODE:
            oldest = n_kv - window
            first_seen = oldest
        else:
            oldest = n_kv - window
            first_seen = tl.min(tl.where(live & (lengths > 0), lengths, longest), 0) - window
        begin = tl.maximum(begin, tl.maximum(first_seen, 0) // TILE * TILE)

    k_base = k + sequence64 * k_b + kv_head.to(tl.int64) * k_h
    v_base = v + sequence64 * v_b + kv_head.to(tl.int64) * v_h

    d1 = tl.arange(0, DK1)
    q_head = (kv_head * q_ratio + first_head - q_shift + head).to(tl.int64) * q_h
    q1 = tl.load((q_row + q_head)[:, None] + d1[None, :], mask=live[:, None] & (d1 < DK)[None, :], other=0.0)
    if DK2 > 0:
        d2 = DK1 + tl.arange(0, DK2)
        q2 = tl.load(
            (q_row + q_head)[:, None] + d2[None, :], mask=live[:, None] & (d2 < DK)[None, :], other=0.0
        )
    if ALIBI:
        slope = tl.load(alibi + kv_head * ratio + first_head + head, mask=live, other=0.0) * _LOG2_E

    ACC: tl.constexpr = tl.float16 if ACC_F16 else tl.float32
    m = tl.full([M], -float("inf"), tl.float32)
    # With few rows a tile of P lies across warps, and adding up its columns costs barriers: they are added up
    # once, at the end.
    LATE_SUM: tl.constexpr = M <= 32
    l = tl.zeros([M, TILE] if LATE_SUM else [M], tl.float32)
    acc1 = tl.zeros([M, DV1], ACC)
    e1 = tl.arange(0, DV1)
    if DV2 > 0:
        acc2 = tl.zeros([M, DV2], ACC)
        e2 = DV1 + tl.arange(0, DV2)

    j = tl.arange(0, TILE)
    for start in tl.range(begin, end, TILE):
        inside = start + j < end
        if WINDOW:
            # Not loaded: what lies before every row's window may be NaN, and 0 * NaN is NaN.
            inside = inside & (start + j >= first_seen)
        k_tile = k_base + tl.cast(start, tl.int64) * k_s
        k_mask = inside[:, None]
        if DK1 > DK:
            k_mask = k_mask & (d1 < DK)[None, :]
        k1 = tl.load(k_tile + j[:, None] * k_s + d1[None, :], mask=k_mask, other=0.0)
        s = product(q1, tl.trans(k1), tl.zeros([M, TILE], tl.float32))
        if DK2 > 0:
            k2 = tl.load(
                k_tile + j[:, None] * k_s + d2[None, :], mask=inside[:, None] & (d2 < DK)[None, :], other=0.0
            )
            s = product(q2, tl.trans(k2), s)
        if SOFTCAP:
            s = tanh(s * logit_scale) * softcap
        else:
            s = s * logit_scale
        if ALIBI:
            s += slope[:, None] * (start + j[None, :] - (n_kv - 1)).to(tl.float32)
        visible = inside[None, :]
        if not DECODE:
            visible = visible & (start + j[None, :] < n_kv)
        if WINDOW:
            visible = visible & (start + j[None, :] >= oldest)
        s = tl.where(visible, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # A row that has seen no key yet must not make inf - inf.
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(s - shift[:, None])
        rescale = tl.exp2(m - shift)
        if LATE_SUM:
            l = l * rescale[:, None] + p
        else:
            l = l * rescale + tl.sum(p, 1)
        m = m_new
        if V_IS_K:
            acc1 = accumulate(acc1, rescale, p, k1, k1.dtype, P_TYPE, ACC_F16)
        else:
            v_tile = v_base + tl.cast(start, tl.int64) * v_s
            v_mask = inside[:, None]
            if DV1 > DV:
                v_mask = v_mask & (e1 < DV)[None, :]
            v1 = tl.load(v_tile + j[:, None] * v_s + e1[None, :], mask=v_mask, other=0.0)
            acc1 = accumulate(acc1, rescale, p, v1, v1.dtype, P_TYPE, ACC_F16)
            if DV2 > 0:
                v2 = tl.load(
                    v_tile + j[:, None] * v_s + e2[None, :],
                    mask=inside[:, None] & (e2 < DV)[None, :],
                    other=0.0,
                )
                acc2 = accumulate(acc2, rescale, p, v2, v2.dtype, P_TYPE, ACC_F16)

    if LATE_SUM:
        l = tl.sum(l, 1)
    empty = l == 0
    l_safe = tl.where(empty, 1.0, l)
    slot = (row * slots + part) * q_heads + kv_head * ratio + first_head + head
    tl.store(lse + slot, tl.where(empty, -float("inf"), (m + tl.log2(l_safe)) * _LN_2), mask=live)
    if part < count:
        inverse = 1 / l_safe
        tl.store(
            out + slot[:, None] * DV + e1[None, :],
            acc1.to(tl.float32) * inverse[:, None],
            mask=live[:, None] & (e1 < DV)[None, :],
        )
        if DV2 > 0:
            tl.store(
                out + slot[:, None] * DV + e2[None, :],
                acc2.to(tl.float32) * inverse[:, None],
                mask=live[:, None] & (e2 < DV)[None, :],
            )


@triton.jit
def _load_parts(part_out, part_lse, first, i, slots, q_heads, d, DV: tl.constexpr, AT_ONCE: tl.constexpr):
    """Output and lse of parts i .. i + AT_ONCE - 1, in turn; beyond the last slot, the last again."""
    held = ()
    for u in tl.static_range(AT_ONCE):
        slot = first + tl.minimum(i + u, slots - 1) * q_heads
        o = tl.load(part_out + slot * DV + d, mask=d < DV, other=0.0)
        held = held + (o, tl.load(part_lse + slot))  # noqa: RUF005 (Triton has no unpacking)
    return held


@triton.jit(
    do_not_specialize=["q_heads", "slots"],
    do_not_specialize_on_alignment=["part_lse", "kv_len", "sinks", "lse"],
)
def combine_parts(
    part_out,
    part_lse,
    kv_len,
    sinks,
    out,
    lse,
    q_heads,
    slots,
    DV: tl.constexpr,
    DV1: tl.constexpr,
    SINKS: tl.constexpr,
    OVERLAP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Grid (rows, Hq): `merge.merge_sequential` of one row and head over its parts, in their order.

    part_out [rows, slots, Hq, DV], part_lse [rows, slots, Hq]: a slot without a part has lse = -inf, and
    whatever its output holds is not used. AT_ONCE: parts whose loads are in flight at once; the order of the
    sums does not depend on it. A sink is one more part, the last, with output 0.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    # Read before the wait: the kernel in front has waited for whatever wrote it.
    if tl.load(kv_len + row) < 0:
        return
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    d = tl.arange(0, DV1)
    first = row * slots * q_heads + head
    top = -float("inf")
    if SINKS:
        sink = tl.load(sinks + head)
        top = tl.maximum(top, sink)
    several = tl.arange(0, AT_ONCE)
    # The first parts are on their way while the maximum is looked for.
    held = _load_parts(part_out, part_lse, first, 0, slots, q_heads, d, DV, AT_ONCE)
    for i in range(0, slots, AT_ONCE):
        some = tl.load(
            part_lse + first + (i + several) * q_heads, mask=i + several < slots, other=-float("inf")
        )
        top = tl.maximum(top, tl.max(some, 0))
    # All parts empty: exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
    shift = tl.where(top == -float("inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros([DV1], tl.float32)
    for i in range(0, slots, AT_ONCE):
        if i > 0:
            held = _load_parts(part_out, part_lse, first, i, slots, q_heads, d, DV, AT_ONCE)
        for u in tl.static_range(AT_ONCE):
            weight = tl.where(i + u < slots, tl.exp(held[2 * u + 1] - shift), 0.0)
            total += weight
            acc += weight * tl.where(weight > 0, held[2 * u], 0.0)
    if SINKS:
        total += tl.exp(sink - shift)
    empty = total == 0
    safe = tl.where(empty, 1.0, total)
    tl.store(out + (row * q_heads + head) * DV + d, acc / safe, mask=d < DV)
    tl.store(lse + row * q_heads + head, tl.where(empty, -float("inf"), shift + tl.log(safe)))
