"""Device code of exact attention on a GPU: float64 tile by tile, so that no logit passes through memory.

A program handles one KV head and M of its rows, which are query tokens times query heads a KV head: row i is
token i // r and head i % r. With m the running maximum of a row's logits, l the denominator and a the
numerator, over tiles of N keys,

    m' = max(m, max_j s_j)    c = exp(m - m')    p_j = exp(s_j - m')
    l' = c l + sum_j p_j      a' = c a + sum_j p_j v_j

and a / l, m + ln l are the result, every step in float64. A row's bits do not depend on the rows beside it.
Importing this module imports Triton, which decides then whether it compiles or interprets.
"""

# Triton's functions are not typed.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "tiles", "keys"])
def attend_float64(
    q,
    k,
    v,
    kv_len,
    out,
    lse,
    tokens,
    tiles,
    keys,
    RATIO: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Grid (tiles, B * KV heads).

    q [B, T, Hq, DK], scaled, k [B, S, Hkv, DK] and v [B, S, Hkv, DV] in float64, contiguous; kv_len [B, T];
    out [B, T, Hq, DV] and lse [B, T, Hq] in float64. Head sizes are powers of two.
    """
    # Longest rows first, so that short ones fill the end of the launch.
    tile = tiles - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    i = tile * M + tl.arange(0, M)
    live = i < tokens * RATIO
    token = batch * tokens + i // RATIO
    row = (token * KV_HEADS + head) * RATIO + i % RATIO
    lengths = tl.load(kv_len + token, mask=live, other=0)
    end = tl.max(lengths, 0)
    d = tl.arange(0, DK)
    e = tl.arange(0, DV)
    j = tl.arange(0, N)
    queries = tl.load(q + row[:, None] * DK + d[None, :], mask=live[:, None], other=0.0)
    k += (batch * keys * KV_HEADS + head) * DK
    v += (batch * keys * KV_HEADS + head) * DV
    m = tl.full([M], -float("inf"), tl.float64)
    l = tl.zeros([M], tl.float64)
    acc = tl.zeros([M, DV], tl.float64)
    for start in tl.range(0, end, N):
        first = tl.cast(start, tl.int64) * KV_HEADS
        inside = (start + j < end)[:, None]
        some_k = tl.load(k + first * DK + (j[:, None] * (KV_HEADS * DK) + d[None, :]), mask=inside, other=0.0)
        s = tl.dot(queries, tl.trans(some_k), tl.zeros([M, N], tl.float64), out_dtype=tl.float64)
        s = tl.where((start + j)[None, :] < lengths[:, None], s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # A row that has seen no key yet must not make inf - inf.
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp(s - shift[:, None])
        rescale = tl.exp(m - shift)
        m = m_new
        l = l * rescale + tl.sum(p, 1)
        some_v = tl.load(v + first * DV + (j[:, None] * (KV_HEADS * DV) + e[None, :]), mask=inside, other=0.0)
        acc = tl.dot(p, some_v, acc * rescale[:, None], out_dtype=tl.float64)
    empty = l == 0
    safe = tl.where(empty, 1.0, l)
    tl.store(lse + row, tl.where(empty, -float("inf"), m + tl.log(safe)), mask=live)
    tl.store(out + row[:, None] * DV + e[None, :], acc / safe[:, None], mask=live[:, None])
