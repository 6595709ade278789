"""Equality to the bit, NaN included: what `identical` and the control mean by equal."""

from __future__ import annotations

import torch

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two floating tensors have one type, one shape and the same bits. 0.0 and -0.0 differ."""
    if a.dtype != b.dtype:
        return False
    integers = _INTEGERS[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))
