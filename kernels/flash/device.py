"""The device code of `flash`: one kernel that attends tile by tile, and one that combines KV parts.

Importing this module imports Triton, and Triton decides then whether functions are compiled or interpreted
(TRITON_INTERPRET=1): `verify.kernels.flash` therefore imports it only when a kernel is built for a device
that runs it.

A program of `attend_tiles` handles one head group of one KV head, one KV part, and one matrix tile of M rows:
row i of the tile is query token i // g of the tile and head i % g of the group of g heads. On the decode path
a tile holds one token, of a window of plain rows as many as the largest head group leaves room for, on the
paths several and prefill M // r. Rows of decode and several each have the parts of their own keys: a program
goes through all that one of its rows has in this part, and each row sees its own; tiles of which it sees
nothing leave m, l and a as they are. Of pages, the numbers of a tile's pages are loaded a tile ahead, so that
no key waits for them. With m the running maximum of the logits in base 2, l the denominator and a the
numerator of a row, over tiles of TILE keys,

    m' = max(m, max_j s_j)    c = 2^(m - m')    p_j = 2^(s_j - m')
    l' = c l + sum_j p_j      a' = c a + sum_j p_j v_j

and a / l, (m + log2 l) ln 2 are the part's result. Everything that depends on head groups, KV cuts or lengths
is a run-time argument that Triton must not specialise on: every grouping and every cut runs the same binary,
which is what makes their results equal to the bit where their cuts are equal.
"""

# Triton's functions are not typed.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from verify.kernels.flash.tile_arithmetic import (
    LN_2,
    LOG2_E,
    accumulate,
    product,
    scaled,
    sum_of_keys,
    tanh,
    weights,
)
from verify.kernels.flash.tile_rows import in_bunches, part_bounds, rows_see, seen_by_all


@triton.jit
def wait_for_launch_in_front(OVERLAP: tl.constexpr):
    """Before anything is read that the launch in front may have written, where this one has begun before that
    has ended. Again it costs nothing."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit(
    do_not_specialize=[
        "tokens",
        "tiles_a_bunch",
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
        "table_b",
        "listed_t",
        "mask_b",
        "mask_h",
        "mask_t",
        "keys",
    ],
    do_not_specialize_on_alignment=[
        "groups", "kv_len", "alibi", "lse", "tile_rows", "table", "listed", "last_key", "mask"
    ],
)  # fmt: skip
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
    tiles_a_bunch,
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
    tile_rows,
    table,
    listed,
    last_key,
    mask,
    table_b,
    listed_t,
    mask_b,
    mask_h,
    mask_t,
    k_tiles,
    v_tiles,
    keys,
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
    SEVERAL: tl.constexpr,
    AS_ALONE: tl.constexpr,
    PACKED: tl.constexpr,
    PAGE: tl.constexpr,
    LISTED: tl.constexpr,
    MASK: tl.constexpr,
    P_TYPE: tl.constexpr,
    ACC_F16: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    COPIED: tl.constexpr,
    BUNCHED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (sequences * tiles, KV heads * n_groups, slots).

    q [B, T, Hkv * q_ratio, DK] with strides q_b, q_t, q_h; k and v [B, S, Hkv, D] likewise, last stride 1.
    kv_len [B, T]: a negative one marks a row that another launch computes; same_length: that of all rows, on
    the path several of each sequence's newest, whose others have one less each; or -1. groups [G, 2]: first
    head and size of each head group; group_size: that of all groups but the last, which holds the rest, or 0.
    out [B, T, slots, Hq, DV] and lse [B, T, slots, Hq] in float32.
    Head sizes are split into a power of two and a padded rest: DK1 + DK2 >= DK, DV1 + DV2 >= DV.

    SEVERAL: rows of a tile have parts of their own. AS_ALONE: they are of the path decode, where a row has
    the bits that DECODE gives it by itself. PACKED: q is [1, sum T, ...], and tile_rows [tiles, 3] has the
    sequence, the first token and the number of tokens of each tile. PAGE: keys of a page, 0 for none;
    k and v are [P, PAGE, Hkv, D] then, and table [B, pages] with stride table_b has the pages of each
    sequence. LISTED: row t goes through keys listed[b, t, 0 .. kv_len[b, t] - 1] alone, a list of stride
    listed_t a row, and last_key [B, T] is what kv_len is elsewhere. MASK: 1 for truth values, 2 for numbers:
    mask with strides mask_b, mask_h, mask_t and last stride 1. COPIED: k_tiles and v_tiles describe k and v
    as [B * keys, Hkv * D] in tiles [TILE, D]; those that every row sees whole are copied by them, without
    masks. BUNCHED: programs go through tiles and heads in bunches of tiles_a_bunch tiles.
    """
    tile_id, kv_head = tl.program_id(0), tl.program_id(1)
    if BUNCHED:
        tile_id, kv_head = in_bunches(tiles_a_bunch)
    if PACKED:
        wait_for_launch_in_front(OVERLAP)
        sequence = tl.load(tile_rows + 3 * tile_id)
        first_token = tl.load(tile_rows + 3 * tile_id + 1)
        end_token = first_token + tl.load(tile_rows + 3 * tile_id + 2)
        in_batch = tl.cast(0, tl.int64)
    else:
        # Divisions stand in branches: each costs a tenth of a microsecond before the first load.
        sequence = 0
        if tile_id >= tiles:
            sequence = tile_id // tiles
        # Longest rows first, so that short ones fill the end of the launch.
        tile = tiles - 1 - (tile_id - sequence * tiles)
        in_batch = tl.cast(sequence, tl.int64)
        first_token = tile
        if not DECODE:
            first_token = tile * tokens_a_tile
        end_token = tokens
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
        wait_for_launch_in_front(OVERLAP)
        first_head = tl.load(groups + 2 * group)
        size = tl.load(groups + 2 * group + 1)

    i = tl.arange(0, M)
    if DECODE:
        n_kv = same_length
        if same_length < 0:
            wait_for_launch_in_front(OVERLAP)
            n_kv = tl.load(kv_len + in_batch * tokens + first_token)
        if n_kv < 0:
            return
        longest = n_kv
        live = i < size
        head = i
        row = in_batch * tokens + first_token + i * 0
        q_row = q + in_batch * q_b + first_token.to(tl.int64) * q_t + i * 0
    else:
        # i // size for i < 128 and size <= 64, without a division for each row.
        of_tile = (i * ((65535 + size) // size)) >> 16
        token = first_token + of_tile
        head = i - of_tile * size
        live = (i < tokens_a_tile * size) & (token < end_token)
        row = in_batch * tokens + token
        if SEVERAL and same_length >= 0:
            lengths = tl.where(live, same_length - (tokens - 1 - token), 0)
        else:
            wait_for_launch_in_front(OVERLAP)
            lengths = tl.load(kv_len + row, mask=live, other=0)
        if SEVERAL:
            # Rows of another launch.
            live = live & (lengths >= 0)
            lengths = tl.maximum(lengths, 0)
        longest = tl.max(lengths, 0)
        n_kv = lengths[:, None]
        q_row = q + in_batch * q_b + token.to(tl.int64) * q_t
    if LISTED:
        wait_for_launch_in_front(OVERLAP)
        # Places, by which a window and ALiBi go; a list has them in any order.
        n_kv = tl.load(last_key + in_batch * tokens + first_token)
    if SEVERAL:
        shortest = tl.min(tl.where(live, lengths, longest), 0)
        if (shortest + BLOCK - 1) // BLOCK == (longest + BLOCK - 1) // BLOCK:
            # As many tiles in each row: parts begin and end alike, but where a row ends.
            own_begin, own_end, count = part_bounds(longest, part, parts, tiles_a_part, BLOCK)
            own_begin = tl.minimum(lengths, own_begin)
            own_end = tl.minimum(lengths, own_end)
            count = count + 0 * lengths
        else:
            own_begin, own_end, count = part_bounds(lengths, part, parts, tiles_a_part, BLOCK)
        end = tl.max(own_end, 0)
        begin = tl.min(tl.where(own_begin < own_end, own_begin, end), 0)
    else:
        begin, end, count = part_bounds(longest, part, parts, tiles_a_part, BLOCK)
        own_begin, own_end = begin, end
    oldest = n_kv
    if WINDOW:
        if DECODE:
            oldest = n_kv - window
            first_seen = oldest
        else:
            oldest = n_kv - window
            first_seen = tl.min(tl.where(live & (lengths > 0), lengths, longest), 0) - window
        if not LISTED:
            begin = tl.maximum(begin, tl.maximum(first_seen, 0) // TILE * TILE)

    wait_for_launch_in_front(OVERLAP)
    if OVERLAP:
        # Let the next one come forward as well.
        tl.extra.cuda.gdc_launch_dependents()
    if PAGE > 0:
        pages = table + sequence64 * table_b
        k_base = k + kv_head.to(tl.int64) * k_h
        v_base = v + kv_head.to(tl.int64) * v_h
    else:
        k_base = k + sequence64 * k_b + kv_head.to(tl.int64) * k_h
        v_base = v + sequence64 * v_b + kv_head.to(tl.int64) * v_h

    j = tl.arange(0, TILE)
    # Whether a tile's keys lie one after another in a larger page.
    IN_ONE: tl.constexpr = (PAGE > TILE and PAGE % TILE == 0) and not LISTED
    # Whether a tile is some whole pages, or one: tiles begin at multiples of TILE.
    SOME_PAGES: tl.constexpr = (PAGE > 0 and PAGE <= TILE and TILE % PAGE == 0) and not LISTED
    # Whether each key of a tile is looked up.
    LOOKED_UP: tl.constexpr = LISTED or (PAGE > 0 and not IN_ONE)
    if LISTED:
        list_row = listed + (in_batch * tokens + first_token) * listed_t
        next_at = tl.load(list_row + begin + j, mask=begin + j < end, other=0)
    # Asked for before q, whose latency hides theirs.
    if IN_ONE:
        next_page = tl.load(pages + begin // PAGE, mask=begin < end, other=0)
    elif SOME_PAGES:
        # What does not change from tile to tile: a row of pointers each for ids, keys and values.
        page_at = pages + j // PAGE
        next_page = tl.load(page_at + begin // PAGE, mask=begin + j < end, other=0)
        k_in_page = k_base + (j % PAGE)[:, None] * k_s
        v_in_page = v_base + (j % PAGE)[:, None] * v_s
    elif PAGE > 0:
        if LISTED:
            next_page = tl.load(pages + next_at // PAGE, mask=begin + j < end, other=0)
        else:
            next_page = tl.load(pages + (begin + j) // PAGE, mask=begin + j < end, other=0)

    d1 = tl.arange(0, DK1)
    q_head = (kv_head * q_ratio + first_head - q_shift + head).to(tl.int64) * q_h
    q1 = tl.load((q_row + q_head)[:, None] + d1[None, :], mask=live[:, None] & (d1 < DK)[None, :], other=0.0)
    if DK2 > 0:
        d2 = DK1 + tl.arange(0, DK2)
        q2 = tl.load(
            (q_row + q_head)[:, None] + d2[None, :], mask=live[:, None] & (d2 < DK)[None, :], other=0.0
        )
    if ALIBI:
        slope = tl.load(alibi + kv_head * ratio + first_head + head, mask=live, other=0.0) * LOG2_E

    ACC: tl.constexpr = tl.float16 if ACC_F16 else tl.float32
    m = tl.full([M], -float("inf"), tl.float32)
    # With few rows a tile of P lies across warps, and adding up its columns costs barriers: they are added up
    # once, at the end. So they are where larger tiles must give the same bits.
    LATE_SUM: tl.constexpr = M <= 32 or AS_ALONE
    l = tl.zeros([M, TILE] if LATE_SUM else [M], tl.float32)
    acc1 = tl.zeros([M, DV1], ACC)
    e1 = tl.arange(0, DV1)
    if DV2 > 0:
        acc2 = tl.zeros([M, DV2], ACC)
        e2 = DV1 + tl.arange(0, DV2)

    # Whether masks are for some tiles alone. One row of heads costs less than a branch; and elsewhere Triton
    # 3.6 lays a tile out otherwise behind one, which adds up P in another order where it is added up at once.
    BRANCH: tl.constexpr = (
        not DECODE
        and not LISTED
        and MASK == 0
        and (M >= 128 or (M == 64 and DV1 <= 128) or (M < 64 and DV1 > M and TILE > M))
    )
    if BRANCH or COPIED:
        all_from, all_to = seen_by_all(live, lengths, own_begin, own_end, begin, end, window, SEVERAL, WINDOW)
    if MASK > 0:
        mask_head = (kv_head * ratio + first_head + head).to(tl.int64) * mask_h
        mask_row = mask + in_batch * mask_b + mask_head + (row - in_batch * tokens) * mask_t
    if COPIED:
        whole = begin + tl.maximum(all_to - begin, 0) // TILE * TILE
        first_key = sequence * keys
        for start in tl.range(begin, whole, TILE):
            k1 = k_tiles.load([first_key + start, kv_head * DK])
            v1 = v_tiles.load([first_key + start, kv_head * DV])
            s = product(q1, tl.trans(k1), tl.zeros([M, TILE], tl.float32))
            p, rescale, m, l = weights(scaled(s, logit_scale, True), m, l, LATE_SUM)
            acc1 = accumulate(acc1, rescale, p, v1, v1.dtype, P_TYPE, ACC_F16)
        begin = whole
    for start in tl.range(begin, end, TILE):
        inside = start + j < end
        at = start + j
        if LISTED:
            at = next_at
            next_at = tl.load(list_row + start + TILE + j, mask=start + TILE + j < end, other=0)
        if WINDOW:
            # Not loaded: what lies before every row's window may be NaN, and 0 * NaN is NaN.
            inside = inside & (at >= first_seen)
        if MASK > 0:
            visible = rows_see(inside, at, n_kv, own_begin, own_end, oldest, DECODE, SEVERAL, WINDOW)
            visible = visible & live[:, None]
            masked = tl.load(mask_row[:, None] + at[None, :], mask=visible, other=0)
            visible = visible & (masked > 0 if MASK == 1 else masked > -float("inf"))
            # What no row of the tile sees is not loaded: of a tile that is hidden whole nothing is read.
            inside = inside & (tl.max(visible.to(tl.int32), 0) > 0)
        if PAGE > 0:
            page = tl.cast(next_page, tl.int64)
        if IN_ONE:
            next_page = tl.load(pages + (start + TILE) // PAGE, mask=start + TILE < end, other=0)
            k_tile = k_base + page * k_b + tl.cast(start % PAGE, tl.int64) * k_s
            v_tile = v_base + page * v_b + tl.cast(start % PAGE, tl.int64) * v_s
        elif SOME_PAGES:
            next_page = tl.load(page_at + (start + TILE) // PAGE, mask=start + TILE + j < end, other=0)
            k_keys = k_in_page + (page * k_b)[:, None]
            v_keys = v_in_page + (page * v_b)[:, None]
        elif PAGE > 0:
            if LISTED:
                next_page = tl.load(pages + next_at // PAGE, mask=start + TILE + j < end, other=0)
            else:
                next_page = tl.load(pages + (start + TILE + j) // PAGE, mask=start + TILE + j < end, other=0)
            k_keys = k_base + (page * k_b + tl.cast(at % PAGE, tl.int64) * k_s)[:, None]
            v_keys = v_base + (page * v_b + tl.cast(at % PAGE, tl.int64) * v_s)[:, None]
        elif LISTED:
            k_keys = k_base + (tl.cast(at, tl.int64) * k_s)[:, None]
            v_keys = v_base + (tl.cast(at, tl.int64) * v_s)[:, None]
        else:
            k_tile = k_base + tl.cast(start, tl.int64) * k_s
            v_tile = v_base + tl.cast(start, tl.int64) * v_s
        if not LOOKED_UP:
            k_keys = k_tile + j[:, None] * k_s
            v_keys = v_tile + j[:, None] * v_s
        k_mask = inside[:, None]
        if DK1 > DK:
            k_mask = k_mask & (d1 < DK)[None, :]
        k1 = tl.load(k_keys + d1[None, :], mask=k_mask, other=0.0)
        s = product(q1, tl.trans(k1), tl.zeros([M, TILE], tl.float32))
        if DK2 > 0:
            k2 = tl.load(k_keys + d2[None, :], mask=inside[:, None] & (d2 < DK)[None, :], other=0.0)
            s = product(q2, tl.trans(k2), s)
        if SOFTCAP:
            s = scaled(tanh(s * logit_scale), softcap, BRANCH)
        else:
            s = scaled(s, logit_scale, BRANCH)
        if ALIBI:
            s += slope[:, None] * (at[None, :] - (n_kv - 1)).to(tl.float32)
        if BRANCH:
            if start < all_from or start + TILE > all_to:
                visible = rows_see(inside, at, n_kv, own_begin, own_end, oldest, DECODE, SEVERAL, WINDOW)
                s = tl.where(visible, s, -float("inf"))
        else:
            if MASK == 0:
                visible = rows_see(inside, at, n_kv, own_begin, own_end, oldest, DECODE, SEVERAL, WINDOW)
            if MASK == 2:
                s += masked * LOG2_E
            s = tl.where(visible, s, -float("inf"))
        p, rescale, m, l = weights(s, m, l, LATE_SUM)
        if V_IS_K:
            acc1 = accumulate(acc1, rescale, p, k1, k1.dtype, P_TYPE, ACC_F16)
        else:
            v_mask = inside[:, None]
            if DV1 > DV:
                v_mask = v_mask & (e1 < DV)[None, :]
            v1 = tl.load(v_keys + e1[None, :], mask=v_mask, other=0.0)
            acc1 = accumulate(acc1, rescale, p, v1, v1.dtype, P_TYPE, ACC_F16)
            if DV2 > 0:
                v2 = tl.load(v_keys + e2[None, :], mask=inside[:, None] & (e2 < DV)[None, :], other=0.0)
                acc2 = accumulate(acc2, rescale, p, v2, v2.dtype, P_TYPE, ACC_F16)

    if LATE_SUM:
        l = sum_of_keys(l, M, TILE)
    empty = l == 0
    l_safe = tl.where(empty, 1.0, l)
    slot = (row * slots + part) * q_heads + kv_head * ratio + first_head + head
    tl.store(lse + slot, tl.where(empty, -float("inf"), (m + tl.log2(l_safe)) * LN_2), mask=live)
    if SEVERAL:
        live = live & (part < count)
        some = part < tl.max(count, 0)
    else:
        some = part < count
    if some:
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
    if OVERLAP:
        # The next launch may come forward at once: it waits for this one, which waits for the one in front.
        tl.extra.cuda.gdc_launch_dependents()
    # Read before the wait: the kernel in front has waited for whatever wrote it.
    if tl.load(kv_len + row) < 0:
        # Whoever waits for this launch waits for those in front of it, too.
        wait_for_launch_in_front(OVERLAP)
        return
    wait_for_launch_in_front(OVERLAP)
    d = tl.arange(0, DV1)
    first = row * slots * q_heads + head
    top = -float("inf")
    if SINKS:
        sink = tl.load(sinks + head)
        top = tl.maximum(top, sink)
    several = tl.arange(0, AT_ONCE)
    held = _load_parts(part_out, part_lse, first, 0, slots, q_heads, d, DV, AT_ONCE)
    for u in tl.static_range(AT_ONCE):
        top = tl.maximum(top, held[2 * u + 1])
    for i in range(AT_ONCE, slots, AT_ONCE):
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
