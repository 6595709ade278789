"""What architectures are made of: RMSNorm and the gates of feed-forwards. float32 throughout."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Of gpt-oss's feed-forward.
OSS_ALPHA, OSS_LIMIT = 1.702, 7.0

Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).mul_(weight)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate).mul_(up)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up, gelu by its tanh formula."""
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, *, limit: float) -> torch.Tensor:
    """silu(gate), at most `limit`, times up, between -limit and limit: Step 3.5."""
    return torch.nn.functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


def clamped_swiglu_plus_one(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """g sigmoid(1.702 g) (u + 1), with g = min(gate, 7) and u = up between -7 and 7: gpt-oss."""
    gate = gate.clamp(max=OSS_LIMIT)
    return gate * torch.sigmoid(OSS_ALPHA * gate) * (up.clamp(-OSS_LIMIT, OSS_LIMIT) + 1)
