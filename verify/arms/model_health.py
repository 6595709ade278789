"""A model that is broken itself: which of its tensors, or after which of its layers, numbers are not finite.

A damaged download of the right size is read without an error, and gives NaN in every arm alike. That is no
kernel's fault: the run is void, and names the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from verify.model.architectures.architecture import Architecture
from verify.model.gguf.dequantize import dequantize, type_is_supported

OVERFLOWS = "the model overflows with exact attention"
# Weights that are looked at in one go.
_AT_ONCE = 1 << 24


def model_fault(architecture: Architecture, layer: int | None = None) -> str:
    """The first tensor with NaN or Inf, in the order in which a run takes them; else where they came up.

    layer: the first one after which the exact arm's hidden state is not finite; None: only its logits are.
    """
    for name in _tensors(architecture, layer):
        if not _is_finite(architecture, name):
            return f"the model's own tensor {name} holds NaN or Inf"
    where = "its logits" if layer is None else f"its hidden state after layer {layer}"
    return f"{OVERFLOWS}: NaN or Inf in {where}, though its weights have none"


def _tensors(architecture: Architecture, layer: int | None) -> Iterator[str]:
    if layer is None:
        yield from architecture.end_tensors.values()
        yield architecture.output_tensor
    elif layer == 0:
        yield architecture.embedding_tensor
    for name in architecture.file.tensors:
        if layer is None or name.startswith(f"blk.{layer}."):
            yield name


def _is_finite(architecture: Architecture, name: str) -> bool:
    info = architecture.file.tensor(name)
    if not info.shape or not type_is_supported(info.type_name):
        return True
    rows = max(_AT_ONCE // max(int(torch.Size(info.shape[1:]).numel()), 1), 1)
    return all(
        bool(torch.isfinite(dequantize(architecture.file, name, rows=slice(first, first + rows))).all())
        for first in range(0, info.shape[0], rows)
    )
