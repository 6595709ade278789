"""Reading the experts of a layer from the metadata, for the architectures that have any."""

from __future__ import annotations

from typing import Any

from verify.model.architectures.architecture import Architecture
from verify.model.architectures.experts import GATING, Experts, Gating
from verify.model.errors import ModelError


def experts_of(
    architecture: Architecture,
    layer: int,
    *,
    gating: Gating | None = None,
    default_gating: Gating | None = None,
    normalised: bool | None = None,
    scaled: bool = True,
    default_size: int | None = None,
    **more: Any,
) -> Experts:
    """The experts of one layer. Raises ModelError.

    gating: what an architecture always has; default_gating: what it has where `expert_gating_func` does not
    say. normalised: None if `expert_weights_norm` says it. scaled: whether `expert_weights_scale` counts.
    more: fields of `Experts` that the metadata does not hold.
    """
    read, path = architecture.metadata, architecture.file.path
    count, used = read.whole("expert_count"), read.whole("expert_used_count")
    if used > count:
        raise ModelError(
            f"{path}: metadata key {read.name('expert_used_count')} is {used}, expected at most the"
            f" {count} experts that there are"
        )
    if gating is None:
        gating = default_gating or "softmax"
        if number := read.whole("expert_gating_func", 0, least=0):
            if number not in GATING:
                raise ModelError(
                    f"{path}: metadata key {read.name('expert_gating_func')} is {number}, expected"
                    f" {', '.join(f'{key} ({name})' for key, name in GATING.items())}"
                )
            gating = GATING[number]
    groups, groups_used = _groups(architecture, count, used)
    size = read.per_layer("expert_feed_forward_length", architecture.blocks, default_size)[layer]
    fields: dict[str, Any] = {
        "width": architecture.width,
        "count": count,
        "used": used,
        "size": size,
        "shared": _shared_size(architecture, layer, size),
        "gating": gating,
        "normalised": read.flag("expert_weights_norm", False) if normalised is None else normalised,
        # Zero stands for a scale that was never set.
        "scale": (read.number("expert_weights_scale", 1.0) or 1.0) if scaled else 1.0,
        "has_bias": architecture.has(layer, "exp_probs_b.bias"),
        "fused": architecture.has(layer, "ffn_gate_up_exps"),
        "groups": groups,
        "groups_used": groups_used,
    }
    return Experts(**(fields | more))


def _groups(architecture: Architecture, count: int, used: int) -> tuple[int, int]:
    """Groups of experts, and those that a row takes. Raises ModelError."""
    read, path = architecture.metadata, architecture.file.path
    groups = read.whole("expert_group_count", 1, least=0) or 1
    groups_used = read.whole("expert_group_used_count", groups, least=0) or groups
    if count % groups:
        raise ModelError(
            f"{path}: metadata key {read.name('expert_group_count')} is {groups}, expected a divisor of the"
            f" {count} experts"
        )
    if groups_used > groups or count // groups * groups_used < used:
        raise ModelError(
            f"{path}: metadata key {read.name('expert_group_used_count')} is {groups_used}, expected at most"
            f" {groups}, and enough for {used} experts"
        )
    return groups, groups_used


def _shared_size(architecture: Architecture, layer: int, size: int) -> int:
    """Inner dimension of the shared experts, which are stored as one; by the tensor where nothing says."""
    read = architecture.metadata
    tensor = architecture.file.tensors.get(architecture.tensor_name(layer, "ffn_gate_shexp"))
    if read.get("expert_shared_feed_forward_length"):
        return read.whole("expert_shared_feed_forward_length", least=0) if tensor is not None else 0
    if read.get("expert_shared_count") is not None:
        return size * read.whole("expert_shared_count", least=0)
    return 0 if tensor is None or not tensor.shape else tensor.shape[0]
