"""The merge of the flash kernel by itself: its combining launch on parts that are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from verify.kernels.flash.launch import device_code, next_power_of_two, parts_at_once
from verify.kernels.merge import Part


def combine(parts: Sequence[Part]) -> Part:
    """`merge.merge_sequential` as the device computes it; out [..., D] and lse [...] in float32.

    parts: at least one; on a CUDA device, or on the CPU where Triton interprets.
    """
    if not parts:
        raise ValueError("parts: expected at least one part")
    shape, size = parts[0].lse.shape, parts[0].out.shape[-1]
    # One row, and a query head for each element: [slots, Hq, D].
    part_out = torch.stack([p.out.float().reshape(-1, size) for p in parts])
    part_lse = torch.stack([p.lse.float().reshape(-1) for p in parts])
    slots, heads = part_lse.shape
    kv_len = torch.ones(1, dtype=torch.int32, device=part_lse.device)
    out, lse = part_out.new_empty((heads, size)), part_lse.new_empty(heads)
    width = next_power_of_two(size)
    device_code().combine_parts[(1, heads)](
        part_out,
        part_lse,
        kv_len,
        None,
        out,
        lse,
        heads,
        slots,
        DV=size,
        DV1=width,
        SINKS=False,
        OVERLAP=False,
        AT_ONCE=parts_at_once(slots),
        num_warps=min(max(width // 32, 1), 8),
    )
    return Part(out.reshape(*shape, size), lse.reshape(shape))
