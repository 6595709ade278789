"""The device code of `flash` over a quantised cache: dequantisation inside the decode kernel.

A program does what one of `device.attend_tiles` does, over a plane of codes and a plane of scales for
keys and for values, in blocks of 32 numbers along the head. A key block's scale is applied after the product
with its codes,

    s_j = scale * sum_b d_jb <q_b, c_jb>        (c: codes less their zero, small integers, exact in float16)

so that codes go to the tensor cores as they are. A value block's scale is multiplied into its codes and
rounded once to float16, which gives the numbers of `expand=f16`. Codes become float16 without a conversion
instruction: a byte under the exponent of 1024 is the float16 number 1024 + c.

Planes of one cache: codes [B, Hkv, S, D] int8 for q8_0; [B, Hkv, S, D / 2] for q4_0, numbers c and c + D / 2
in the low and high half of byte c. scales [B, Hkv, D / 32, S] float16.
"""

# Triton's functions are not typed.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from verify.kernels.flash.tile_arithmetic import IN_INTERPRETER, LN_2, product
from verify.kernels.flash.tile_rows import part_bounds

_BYTES = tl.constexpr(
    "{ .reg .b32 u, a, b, z; xor.b32 u, $2, 0x80808080; mov.b32 z, 0x64806480;"
    " prmt.b32 a, u, 0x64646464, 0x4140; prmt.b32 b, u, 0x64646464, 0x4342;"
    " sub.f16x2 $0, a, z; sub.f16x2 $1, b, z; }"
)
_LOW_HALVES = tl.constexpr(
    "{ .reg .b32 u, a, b, z; and.b32 u, $2, 0x0F0F0F0F; mov.b32 z, 0x64086408;"
    " prmt.b32 a, u, 0x64646464, 0x4140; prmt.b32 b, u, 0x64646464, 0x4342;"
    " sub.f16x2 $0, a, z; sub.f16x2 $1, b, z; }"
)
_HIGH_HALVES = tl.constexpr(
    "{ .reg .b32 u, a, b, z; shr.u32 u, $2, 4; and.b32 u, u, 0x0F0F0F0F; mov.b32 z, 0x64086408;"
    " prmt.b32 a, u, 0x64646464, 0x4140; prmt.b32 b, u, 0x64646464, 0x4342;"
    " sub.f16x2 $0, a, z; sub.f16x2 $1, b, z; }"
)


@triton.jit
def codes(x, BITS: tl.constexpr, HIGH: tl.constexpr):
    """Codes less their zero, in float16: of bytes (8 bits), or of their low or high halves (4 bits)."""
    if IN_INTERPRETER:
        if BITS == 8:
            return x.to(tl.float16)
        elif HIGH:
            return (((x.to(tl.int32) >> 4) & 15) - 8).to(tl.float16)
        else:
            return ((x.to(tl.int32) & 15) - 8).to(tl.float16)
    else:
        ASM: tl.constexpr = _BYTES if BITS == 8 else (_HIGH_HALVES if HIGH else _LOW_HALVES)
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def scales_of(base, start, end, keys, j, BLOCKS: tl.constexpr):
    """The scales of one tile of keys, a vector [TILE] for each block of the head."""
    found = ()
    for b in tl.static_range(BLOCKS):
        inside = start + j < end
        found = found + (tl.load(base + b * keys + start + j, mask=inside, other=0.0),)  # noqa: RUF005
    return found


@triton.jit(
    do_not_specialize=[
        "tokens", "q_heads", "ratio", "q_ratio", "q_shift", "first_group", "n_groups", "group_size",
        "same_length", "parts", "tiles_a_part", "slots", "logit_scale", "keys",
    ],
    do_not_specialize_on_alignment=["groups", "kv_len", "lse"],
)  # fmt: skip
def attend_quantised(
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
    M: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (sequences * tokens, KV heads * n_groups, slots); arguments as in `device.attend_tiles`."""
    BLOCKS: tl.constexpr = D // 32
    WIDTH: tl.constexpr = D * BITS // 8
    CHUNKS: tl.constexpr = WIDTH // 32
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
    d = tl.arange(0, 32)
    q_row = q + sequence64 * q_b + token.to(tl.int64) * q_t
    q_head = (kv_head * q_ratio + first_head - q_shift + i).to(tl.int64) * q_h
    queries = ()
    accs = ()
    for b in tl.static_range(BLOCKS):
        block = tl.load(q_row + q_head[:, None] + b * 32 + d[None, :], mask=live[:, None], other=0.0)
        queries = queries + (block,)  # noqa: RUF005
        accs = accs + (tl.zeros([M, 32], tl.float32),)  # noqa: RUF005
    m = tl.full([M], -float("inf"), tl.float32)
    l = tl.zeros([M, TILE], tl.float32)

    j = tl.arange(0, TILE)
    head = sequence64 * kv_heads + kv_head
    k_base = k_codes + head * keys * WIDTH
    v_base = v_codes + head * keys * WIDTH
    k_scale_base = k_scales + head * BLOCKS * keys
    v_scale_base = v_scales + head * BLOCKS * keys
    # Scales are too small for the load pipeline: those of the next tile are asked for one tile ahead.
    k_next = scales_of(k_scale_base, begin, end, keys, j, BLOCKS)
    v_next = scales_of(v_scale_base, begin, end, keys, j, BLOCKS)
    for start in tl.range(begin, end, TILE):
        inside = start + j < end
        k_scale = k_next
        v_scale = v_next
        k_next = scales_of(k_scale_base, start + TILE, end, keys, j, BLOCKS)
        v_next = scales_of(v_scale_base, start + TILE, end, keys, j, BLOCKS)
        offset = tl.cast(start, tl.int64) * WIDTH
        none = tl.zeros([M, TILE], tl.float32)
        s = tl.zeros([M, TILE], tl.float32)
        for c in tl.static_range(CHUNKS):
            x = tl.load(
                k_base + offset + j[:, None] * WIDTH + c * 32 + d[None, :], mask=inside[:, None], other=0
            )
            s += (
                product(queries[c], tl.trans(codes(x, BITS, False)), none)
                * k_scale[c].to(tl.float32)[None, :]
            )
            if BITS == 4:
                high = product(queries[c + CHUNKS], tl.trans(codes(x, BITS, True)), none)
                s += high * k_scale[c + CHUNKS].to(tl.float32)[None, :]
        s = tl.where(inside[None, :], s * logit_scale, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        l = l * rescale[:, None] + p
        m = m_new
        p16 = p.to(tl.float16)
        low = ()
        high = ()
        for c in tl.static_range(CHUNKS):
            x = tl.load(
                v_base + offset + j[:, None] * WIDTH + c * 32 + d[None, :], mask=inside[:, None], other=0
            )
            v = codes(x, BITS, False) * v_scale[c][:, None]
            low = low + (product(p16, v, accs[c] * rescale[:, None]),)  # noqa: RUF005
            if BITS == 4:
                v = codes(x, BITS, True) * v_scale[c + CHUNKS][:, None]
                high = high + (product(p16, v, accs[c + CHUNKS] * rescale[:, None]),)  # noqa: RUF005
        accs = low + high

    l = tl.sum(l, 1)
    empty = l == 0
    l_safe = tl.where(empty, 1.0, l)
    slot = (row * slots + part) * q_heads + kv_head * ratio + first_head + i
    tl.store(lse + slot, tl.where(empty, -float("inf"), (m + tl.log2(l_safe)) * LN_2), mask=live)
    if part < count:
        inverse = 1 / l_safe
        for b in tl.static_range(BLOCKS):
            tl.store(
                out + slot[:, None] * D + b * 32 + d[None, :], accs[b] * inverse[:, None], mask=live[:, None]
            )


@triton.jit
def expand_planes(
    codes_plane, scales_plane, out, keys, D: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr
):
    """Grid (ceil(S / TILE), B * Hkv): one cache as float16 numbers, out [B, Hkv, S, D]."""
    WIDTH: tl.constexpr = D * BITS // 8
    CHUNKS: tl.constexpr = WIDTH // 32
    start = tl.program_id(0) * TILE
    head = tl.program_id(1).to(tl.int64)
    j, d = tl.arange(0, TILE), tl.arange(0, 32)
    inside = start + j < keys
    row = head * keys + start + j
    scales = scales_plane + head * (D // 32) * keys + start + j
    for c in tl.static_range(CHUNKS):
        x = tl.load(codes_plane + row[:, None] * WIDTH + c * 32 + d[None, :], mask=inside[:, None], other=0)
        scale = tl.load(scales + c * keys, mask=inside, other=0.0)
        numbers = codes(x, BITS, False) * scale[:, None]
        tl.store(out + row[:, None] * D + c * 32 + d[None, :], numbers, mask=inside[:, None])
        if BITS == 4:
            scale = tl.load(scales + (c + CHUNKS) * keys, mask=inside, other=0.0)
            numbers = codes(x, BITS, True) * scale[:, None]
            tl.store(out + row[:, None] * D + (c + CHUNKS) * 32 + d[None, :], numbers, mask=inside[:, None])
