"""Reading the experts of a layer from the metadata, for the architectures that have any."""

from __future__ import annotations

from verify.model.architectures.architecture import Architecture
from verify.model.architectures.experts import GATING, Experts, Gating
from verify.model.errors import ModelError


def experts_of(
    architecture: Architecture,
    layer: int,
    *,
    default_gating: Gating,
    normalised: bool | None = None,
    default_size: int | None = None,
) -> Experts:
    """The experts of one layer. normalised: None if `expert_weights_norm` says it. Raises ModelError."""
    read, path = architecture.metadata, architecture.file.path
    count, used = read.whole("expert_count"), read.whole("expert_used_count")
    if used > count:
        raise ModelError(
            f"{path}: metadata key {read.name('expert_used_count')} is {used}, expected at most the"
            f" {count} experts that there are"
        )
    gating = default_gating
    if number := read.whole("expert_gating_func", 0, least=0):
        if number not in GATING:
            raise ModelError(
                f"{path}: metadata key {read.name('expert_gating_func')} is {number},"
                f" expected 1 (softmax) or 2 (sigmoid)"
            )
        gating = GATING[number]
    groups = read.whole("expert_group_count", 1, least=0)
    if groups > 1 and read.whole("expert_group_used_count", groups) < groups:
        raise ModelError(
            f"{path}: metadata key {read.name('expert_group_used_count')}: experts chosen by groups"
            " are not known here"
        )
    size = read.whole("expert_feed_forward_length", default_size)
    return Experts(
        width=architecture.width,
        count=count,
        used=used,
        size=size,
        shared=size * _shared_count(architecture, layer, size),
        gating=gating,
        normalised=read.flag("expert_weights_norm", False) if normalised is None else normalised,
        # Zero stands for a scale that was never set.
        scale=read.number("expert_weights_scale", 1.0) or 1.0,
        has_bias=architecture.has(layer, "exp_probs_b.bias"),
        fused=architecture.has(layer, "ffn_gate_up_exps"),
    )


def _shared_count(architecture: Architecture, layer: int, size: int) -> int:
    """Shared experts, which are stored as one; by the tensor's shape where the metadata does not say."""
    if architecture.metadata.get("expert_shared_count") is not None:
        return architecture.metadata.whole("expert_shared_count", least=0)
    tensor = architecture.file.tensors.get(architecture.tensor_name(layer, "ffn_gate_shexp"))
    return 0 if tensor is None or not tensor.shape else tensor.shape[0] // size
