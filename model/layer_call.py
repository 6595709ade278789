"""What both drivers ask of an arm at a layer: its call, with inputs rounded once for every arm."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from verify.kernels.cache_types import RunCache
from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.stored import kept
from verify.model.architectures.architecture import AttentionInputs, AttentionSettings


class LayerCall(NamedTuple):
    """One attention call of B consecutive windows. S = T, and more where a prompt comes before the rows."""

    layer: int  # counted from 0
    window: int  # number of the first one in the run
    q: torch.Tensor  # [B, T, H, Dk], rounded
    k: torch.Tensor  # [B, S, Hkv, Dk], rounded
    v: torch.Tensor  # [B, S, Hkv, Dv], rounded
    kv_len: torch.Tensor  # visible keys, [B, T]
    settings: AttentionSettings  # of the layer
    keys: torch.Tensor | None = None  # of those, the ones that each row attends to, [B, T, K]; None: all
    unrounded: AttentionInputs | None = None  # q, k and v before they were; None: the driver keeps none
    x: torch.Tensor | None = None  # [B, T, width], the residual stream that enters the layer; likewise


class AttentionPass(Protocol):
    """One pass of the model. `attend` returns [B, T, H, Dv] float32, or None where the arm has failed."""

    name: str

    def attend(self, call: LayerCall) -> torch.Tensor | None: ...


def after(before: AttentionInputs, inputs: AttentionInputs) -> AttentionInputs:
    """Inputs whose keys and values come after those of a prompt: q [B, T, H, Dk], k and v [B, S, Hkv, D]."""
    k, v = (torch.cat((a, b), 1) for a, b in ((before.k, inputs.k), (before.v, inputs.v)))
    indexer = inputs.indexer
    if indexer is not None and before.indexer is not None:
        indexer = indexer._replace(k=torch.cat((before.indexer.k, indexer.k), 1))
    return AttentionInputs(inputs.q, k, v, indexer)


def round_inputs(inputs: AttentionInputs, to: RunCache, layer: int) -> AttentionInputs:
    """The one rounding of q, k and v to the run's attention type and cache, the same for every arm.

    layer: the one that the keys and values are of. Keys are chosen before it, in the type of everything but
    attention.
    """
    kind, cache = FLOAT_TYPES[to.attention].dtype, to.cache.at(layer)
    q, k, v = (x.to(kind) for x in (inputs.q, inputs.k, inputs.v))
    if cache.as_given:
        return AttentionInputs(q, k, v, keys=inputs.keys)
    blocks = cache.blocks(k.shape[-1], v.shape[-1])
    k, v = kept(k, cache.k, blocks.k, cache.scale), kept(v, cache.v, blocks.v, cache.scale)
    return AttentionInputs(q, k, v, keys=inputs.keys)
