"""The arithmetic of one tile of `flash`, as device code: products, the softmax's step, and what rounds where.

Importing this module imports Triton, and Triton decides then whether functions are compiled or interpreted
(TRITON_INTERPRET=1).
"""

# Triton's functions are not typed.
# mypy: disable-error-code="no-untyped-def,assignment"

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

IN_INTERPRETER = tl.constexpr(INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """x rounded to nearest-even in TYPE. The interpreter truncates to bfloat16, so there it is done by hand
    and left in float32, which holds the same values."""
    if IN_INTERPRETER and tl.bfloat16 == TYPE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def product(a, b, acc):
    """acc + a @ b, accumulated in float32. The interpreter cannot multiply bfloat16: it is widened there."""
    if IN_INTERPRETER:
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
        if not IN_INTERPRETER and tl.float16 == V_TYPE and tl.float16 == P_TYPE:
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
def scaled(x, factor, ROUNDED: tl.constexpr):
    """x * factor; ROUNDED: whatever is made of it, the product is not fused with a sum, which would round
    once where a masked tile rounds twice."""
    if ROUNDED and not IN_INTERPRETER:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, factor], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x * factor


@triton.jit
def weights(s, m, l, LATE_SUM: tl.constexpr):
    """p and c of a tile's logits s [M, TILE], and m' and l'."""
    m_new = tl.maximum(m, tl.max(s, 1))
    # A row that has seen no key yet must not make inf - inf.
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(s - shift[:, None])
    rescale = tl.exp2(m - shift)
    if LATE_SUM:
        return p, rescale, m_new, l * rescale[:, None] + p
    else:
        return p, rescale, m_new, l * rescale + tl.sum(p, 1)


@triton.jit
def sum_of_keys(l, M: tl.constexpr, TILE: tl.constexpr):
    """The sum over the second dimension of l [M, TILE], a power of two, by halves: in this order however
    Triton lays the tile out over threads, which differs with M."""
    for step in tl.static_range(8):
        if TILE >> step > 1:
            l = tl.sum(tl.reshape(l, [M, 2, TILE >> (step + 1)]), 1)
    return tl.reshape(l, [M])
