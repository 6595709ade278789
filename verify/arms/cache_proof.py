"""Proof that a kernel's own cache holds what it is said to, layer by layer of a model.

Keys and values are drawn, not the model's: what is asked is which codec ran, on which tensor of which layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from verify.arms.records import SeenLayers
from verify.kernels.call import checked_call
from verify.kernels.errors import KernelFailure
from verify.kernels.judging.readback import KEYS, CacheSeen, SeenNumbers, look
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import FLOAT_TYPES
from verify.model.architectures.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class CacheProof:
    """What all layers were seen to hold, and what is wrong, in sentences."""

    layers: list[SeenLayers]
    faults: list[str]


def prove_cache(
    kernel: Kernel, architecture: Architecture, attention: str, device: torch.device
) -> CacheProof:
    """Read back some keys and values of every layer. attention: the type of q, k and v.

    A kernel that fails at it proves nothing; its run says what is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    seen: list[CacheSeen] = []
    for layer in filter(architecture.attends, range(architecture.sizes.layers)):
        heads, kv_heads = architecture.heads_of(layer), architecture.kv_heads_of(layer)
        k_size, v_size = architecture.head_sizes_of(layer)
        q, k, v = (
            torch.randn(1, n, count, size, generator=generator).to(device, FLOAT_TYPES[attention].dtype)
            for n, count, size in ((1, heads, k_size), (KEYS, kv_heads, k_size), (KEYS, kv_heads, v_size))
        )
        kv_len = torch.full((1, 1), KEYS, dtype=torch.int32, device=device)
        call = checked_call(q, k, v, kv_len=kv_len, scale=1.0, path="decode")
        try:
            seen.append(look(kernel, replace(call, layer=layer)))
        except (KernelFailure, ValueError):
            return CacheProof(layers=[], faults=[])
    return CacheProof(layers=_joined(seen), faults=[one.fault for one in seen if one.fault is not None])


def _joined(seen: list[CacheSeen]) -> list[SeenLayers]:
    """Neighbouring layers that read alike, together."""
    found: list[SeenLayers] = []
    for one in seen:
        assert one.layer is not None
        mine = SeenLayers(
            first=one.layer,
            last=one.layer,
            cache=one.cache,
            k=None if one.k is None else one.k.kind,
            v=one.v.kind,
            distinct_k=None if one.k is None else one.k.distinct,
            distinct_v=one.v.distinct,
            codes_k=_codes(one.k),
            codes_v=one.v.codes,
        )
        before = found[-1] if found else None
        if before is None or (before.cache, before.k, before.v) != (mine.cache, mine.k, mine.v):
            found.append(mine)
            continue
        distinct_k = None
        if before.distinct_k is not None and mine.distinct_k is not None:
            distinct_k = max(before.distinct_k, mine.distinct_k)
        distinct_v = max(before.distinct_v, mine.distinct_v)
        found[-1] = replace(before, last=mine.last, distinct_k=distinct_k, distinct_v=distinct_v)
    return found


def _codes(seen: SeenNumbers | None) -> int:
    return 0 if seen is None else seen.codes
