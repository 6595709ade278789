"""Device code of `flash` over quantised caches, read a whole row of a tile at a time: `reader=wide|swapped`.

Beside `quantised`, which reads a head in chunks of 32 numbers and multiplies each by itself: here a tile of
keys is one load of whole rows (128 bytes a key of q8_0 at a head of 128), its numbers are made float16 at
once, scales multiplied in and rounded as `expand=f16` has them, and each tile is one product. Of e4m3 with a
scale a KV head, or one alone, codes are multiplied as they are: the scale of keys is part of the logits'
scale, that of values is applied once, to the result.

swapped: keys are the rows of the matrix tile and queries its columns, S^T = K Q^T and O^T = V^T P^T, so that
what is dequantised is the operand that tensor cores take from registers.

Planes: codes [B, Hkv, S, W] int8, as in `quantised` (q4_0: numbers c and c + D / 2 in byte c); scales
[B, Hkv, S, D / 32] float16, of e4m3 [B, Hkv] float32.
"""

# Triton's functions are not typed.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from verify.kernels.flash.quantised import codes
from verify.kernels.flash.tile_arithmetic import LN_2, product
from verify.kernels.flash.tile_rows import part_bounds


@triton.jit
def tile_of(
    base, scales, rows, inside, W: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr, FP8: tl.constexpr
):
    """Numbers [TILE, W] of a tile in float16: of q4_0 the low and the high half, else twice the same."""
    w = tl.arange(0, W)
    x = tl.load(base + rows[:, None] * W + w[None, :], mask=inside[:, None], other=0)
    if FP8:
        numbers = x.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        return numbers, numbers
    else:
        HALF: tl.constexpr = BLOCKS * BITS // 8
        b = tl.arange(0, HALF)
        at = scales + rows[:, None] * BLOCKS + b[None, :]
        low = spread(tl.load(at, mask=inside[:, None], other=0.0), W, HALF)
        first = codes(x, BITS, False) * low
        if BITS == 8:
            return first, first
        else:
            high = spread(tl.load(at + HALF, mask=inside[:, None], other=0.0), W, HALF)
            return first, codes(x, BITS, True) * high


@triton.jit
def spread(scale, W: tl.constexpr, BLOCKS: tl.constexpr):
    """Scales [TILE, BLOCKS] for each number of a row, [TILE, W]."""
    TILE: tl.constexpr = scale.shape[0]
    return tl.reshape(tl.broadcast_to(scale[:, :, None], (TILE, BLOCKS, W // BLOCKS)), (TILE, W))


@triton.jit(
    do_not_specialize=[
        "tokens", "q_heads", "ratio", "q_ratio", "q_shift", "first_group", "n_groups", "group_size",
        "same_length", "parts", "tiles_a_part", "slots", "logit_scale", "keys",
    ],
    do_not_specialize_on_alignment=["groups", "kv_len", "lse"],
)  # fmt: skip
def attend_wide(
    q,
    k_codes,
    k_scales,
    v_codes,
    v_scales,
    kv_len,
    groups,
    out,
    lse,
    tokens,
    keys,
    q_heads,
    kv_heads,
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
    q_b,
    q_t,
    q_h,
    D: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    SWAPPED: tl.constexpr,
    M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (sequences * tokens, KV heads * n_groups, slots); arguments as in `device.attend_tiles`."""
    BLOCKS: tl.constexpr = D // 32
    W: tl.constexpr = D * BITS // 8
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row_id = tl.program_id(0)
    sequence = 0
    if row_id >= tokens:
        sequence = row_id // tokens
    token = tokens - 1 - (row_id - sequence * tokens)
    kv_head = tl.program_id(1)
    group = first_group
    if n_groups > 1:
        group += kv_head % n_groups
        kv_head = kv_head // n_groups
    part = tl.program_id(2)
    sequence64 = tl.cast(sequence, tl.int64)
    first_head = group * group_size
    size = tl.minimum(group_size, ratio - first_head)
    if group_size == 0:
        first_head = tl.load(groups + 2 * group)
        size = tl.load(groups + 2 * group + 1)
    row = sequence64 * tokens + token
    n_kv = same_length
    if same_length < 0:
        n_kv = tl.load(kv_len + row)
    if n_kv < 0:
        return
    begin, end, count = part_bounds(n_kv, part, parts, tiles_a_part, BLOCK)

    i = tl.arange(0, M)
    live = i < size
    w = tl.arange(0, W)
    q_at = q + sequence64 * q_b + token.to(tl.int64) * q_t
    q_at += (kv_head * q_ratio + first_head - q_shift + i).to(tl.int64)[:, None] * q_h + w[None, :]
    # Queries of the numbers that a tile's bytes hold: of q4_0 of both halves of the head.
    q_low = tl.load(q_at, mask=live[:, None], other=0.0)
    q_high = q_low
    if BITS == 4:
        q_high = tl.load(q_at + W, mask=live[:, None], other=0.0)
    if SWAPPED:
        q_low = tl.trans(q_low)
        q_high = tl.trans(q_high)

    j = tl.arange(0, TILE)
    head = sequence64 * kv_heads + kv_head
    k_base = k_codes + head * keys * W
    v_base = v_codes + head * keys * W
    k_scale_at = k_scales + head * keys * BLOCKS
    v_scale_at = v_scales + head * keys * BLOCKS
    scale = logit_scale
    v_scale = 1.0
    if FP8:
        scale = logit_scale * tl.load(k_scales + head)
        v_scale = tl.load(v_scales + head)
    m = tl.full([M], -float("inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    if SWAPPED:
        low = tl.zeros([W, M], tl.float32)
        high = tl.zeros([W, M], tl.float32)
        none = tl.zeros([TILE, M], tl.float32)
    else:
        low = tl.zeros([M, W], tl.float32)
        high = tl.zeros([M, W], tl.float32)
        none = tl.zeros([M, TILE], tl.float32)
    for start in tl.range(begin, end, TILE):
        inside = start + j < end
        rows = (start + j).to(tl.int64)
        k_low, k_high = tile_of(k_base, k_scale_at, rows, inside, W, BLOCKS, BITS, FP8)
        if SWAPPED:
            s = product(k_low, q_low, none)
            if BITS == 4:
                s = product(k_high, q_high, s)
            s = tl.where(inside[:, None], s * scale, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, 0))
            p = tl.exp2(s - m_new[None, :])
            rescale = tl.exp2(m - m_new)
            l = l * rescale + tl.sum(p, 0)
        else:
            s = product(q_low, tl.trans(k_low), none)
            if BITS == 4:
                s = product(q_high, tl.trans(k_high), s)
            s = tl.where(inside[None, :], s * scale, -float("inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
            rescale = tl.exp2(m - m_new)
            l = l * rescale + tl.sum(p, 1)
        m = m_new
        p16 = p.to(tl.float16)
        v_low, v_high = tile_of(v_base, v_scale_at, rows, inside, W, BLOCKS, BITS, FP8)
        if SWAPPED:
            low = product(tl.trans(v_low), p16, low * rescale[None, :])
            if BITS == 4:
                high = product(tl.trans(v_high), p16, high * rescale[None, :])
        else:
            low = product(p16, v_low, low * rescale[:, None])
            if BITS == 4:
                high = product(p16, v_high, high * rescale[:, None])

    empty = l == 0
    l_safe = tl.where(empty, 1.0, l)
    slot = (row * slots + part) * q_heads + kv_head * ratio + first_head + i
    tl.store(lse + slot, tl.where(empty, -float("inf"), (m + tl.log2(l_safe)) * LN_2), mask=live)
    if part < count:
        inverse = v_scale / l_safe
        if SWAPPED:
            at = out + slot[None, :] * D + w[:, None]
            tl.store(at, low * inverse[None, :], mask=live[None, :])
            if BITS == 4:
                tl.store(at + W, high * inverse[None, :], mask=live[None, :])
        else:
            at = out + slot[:, None] * D + w[None, :]
            tl.store(at, low * inverse[:, None], mask=live[:, None])
            if BITS == 4:
                tl.store(at + W, high * inverse[:, None], mask=live[:, None])
