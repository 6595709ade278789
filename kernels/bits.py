"""Equality to the bit: what `identical`, the control, laws and probes mean by equal.

Two numbers are the same where they compare equal, and where both are NaN. So 0.0 is -0.0: the sign of a zero
tells how a sum was written (one that starts from 0.0 never ends in -0.0), not what it is. Which of its many
patterns a NaN has is the processor's choice.
"""

from __future__ import annotations

import hashlib

import torch


def different(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two floating tensors of one shape differ, bool of that shape."""
    return (a != b) & ~(a.isnan() & b.isnan())


def not_finite(x: torch.Tensor) -> torch.Tensor:
    """Where a floating tensor holds NaN or Inf, bool of its shape: there alone x - x is not 0.

    Two passes over the numbers; `torch.isfinite` makes four.
    """
    return (x - x) != 0


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two floating tensors have one type, one shape and the same numbers."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or (bool(a.isnan().any()) and not bool(different(a, b).any()))


def digest_of(x: torch.Tensor) -> str:
    """A hash of a tensor's type, shape and numbers: the same for two that `same_bits` calls the same."""
    if x.dtype.is_floating_point:
        x = torch.where(x.isnan(), torch.full_like(x, torch.nan), x + 0.0)
    numbers = x.detach().cpu().contiguous()
    told = f"{numbers.dtype} {list(numbers.shape)}".encode()
    content = numbers.view(torch.uint8).numpy().tobytes() if numbers.numel() else b""
    return hashlib.sha256(told + content).hexdigest()[:32]
