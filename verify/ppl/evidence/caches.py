"""What a candidate's own cache costs and loses, and that it ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch

from verify.arms.arm import Arm
from verify.arms.cache_proof import CacheProof, prove_cache
from verify.arms.kernel_errors import rows_of
from verify.kernels.cache_types import AS_GIVEN, CacheSpec, run_cache
from verify.model.architectures.architecture import Architecture
from verify.ppl.record import NOT_KNOWN, CacheRecord


def cache_proofs(
    arms: Sequence[Arm], architecture: Architecture, cache_type: str, device: torch.device
) -> dict[str, CacheProof]:
    """Of every candidate and baseline with a cache of its own, by the arm's name; cache_type: of the run."""
    attention = run_cache(cache_type).attention
    return {
        arm.name: prove_cache(arm.kernel, architecture, attention, device)
        for arm in arms
        if arm.role in ("baseline", "candidate") and arm.kernel is not None and not arm.kernel.cache.as_given
    }


def cache_records(
    arms: Sequence[Arm], architecture: Architecture, proofs: Mapping[str, CacheProof], layers: pa.Table
) -> list[CacheRecord]:
    """One a candidate with a cache of its own. layers: of layers.parquet."""
    found = []
    for arm in arms:
        if arm.role != "candidate" or arm.kernel is None or arm.name not in proofs:
            continue
        rows, proof = rows_of(layers, arm.name), proofs[arm.name]
        lost = dict.fromkeys(("cache_rms", "relative_rms"), NOT_KNOWN)
        if rows.num_rows:
            lost = {name: float(np.sqrt(np.mean(rows[name].to_numpy() ** 2))) for name in lost}
        found.append(
            CacheRecord(
                candidate=arm.name,
                cache=str(arm.kernel.cache),
                bytes_a_token=bytes_a_token(arm.kernel.cache, architecture),
                bytes_a_token_given=bytes_a_token(AS_GIVEN, architecture),
                cache_rms=lost["cache_rms"],
                kernel_rms=lost["relative_rms"],
                layers=proof.layers,
                faults=proof.faults,
            )
        )
    return found


def bytes_a_token(cache: CacheSpec, architecture: Architecture) -> float:
    """Of K and V of one token, in all layers that keep their own."""
    return sum(
        cache.bytes_a_token(architecture.kv_heads_of(layer), *architecture.head_sizes_of(layer), layer)
        for layer in range(architecture.sizes.layers)
        if architecture.attends(layer) and architecture.kv_source(layer) == layer
    )
