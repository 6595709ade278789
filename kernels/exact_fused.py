"""Exact attention of plain calls of many rows in one launch on a GPU (`exact_device`).

Where logits pass through memory, eight times each, memory and not float64 is what exact attention waits for.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch

from verify.kernels.call import AttentionOutput, Call

# Rows of a tile, warps and stages of a program.
TILE_ROWS, WARPS, STAGES = 64, 4, 2
# Keys of a tile by head size, of those whose tiles fit in registers; of K and V the larger counts. Of six
# tiles 64 x 32 was the fastest on an H200 at head size 64, others were not timed
# (`benchmarks/results/h200-exact-in-one-launch.json`).
TILE_KEYS = {16: 16, 32: 16, 64: 32}
# Compute capability from which tensor cores multiply float64.
_FLOAT64_PRODUCTS_FROM = (8, 0)


@functools.cache
def device_code() -> Any:
    """The module of the kernel; importing it decides whether Triton compiles or interprets it."""
    from verify.kernels import exact_device

    return exact_device


def has_fused_form(call: Call) -> bool:
    """Whether a call is one that the kernel has: plain, with heads of a size that it takes."""
    plain = not call.has_forms and call.softcap is None and call.alibi_slopes is None
    plain = plain and call.sliding_window is None and call.sinks is None
    return plain and {call.shape.k_size, call.shape.v_size} <= set(TILE_KEYS)


@functools.cache
def can_run(device: torch.device) -> bool:
    """Whether the device multiplies float64 on tensor cores, and Triton is there."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= _FLOAT64_PRODUCTS_FROM


def fused_attention(call: Call) -> AttentionOutput:
    """out [B, T, Hq, Dv] and lse [B, T, Hq] in float64 of a call that `has_fused_form`."""
    shape = call.shape
    q = (call.q.double() * call.scale).contiguous()
    k, v = call.k.double().contiguous(), call.v.double().contiguous()
    out = q.new_empty((shape.batch, shape.rows, shape.q_heads, shape.v_size))
    lse = q.new_empty((shape.batch, shape.rows, shape.q_heads))
    tiles = -(-shape.rows * shape.ratio // TILE_ROWS)
    if out.numel():
        # Triton launches on the current device.
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
            device_code().attend_float64[(tiles, shape.batch * shape.kv_heads)](
                q,
                k,
                v,
                call.kv_len.to(torch.int32).contiguous(),
                out,
                lse,
                shape.rows,
                tiles,
                shape.keys,
                RATIO=shape.ratio,
                KV_HEADS=shape.kv_heads,
                DK=shape.k_size,
                DV=shape.v_size,
                M=TILE_ROWS,
                N=TILE_KEYS[max(shape.k_size, shape.v_size)],
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return AttentionOutput(out, lse)
