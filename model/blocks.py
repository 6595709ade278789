"""What architectures are made of: RMSNorm, rotary embeddings, the gated feed-forward. float32 throughout."""

from __future__ import annotations

from typing import Literal

import torch

RopeKind = Literal["norm", "neox"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_angles(
    positions: torch.Tensor, size: int, base: float, factors: torch.Tensor | None = None
) -> torch.Tensor:
    """Angle of each rotated pair: position / (base^(2i/size) * factors[i]), [T, size/2] in float64.

    factors [size/2]: what `rope_freqs` of a file divides the frequencies by.
    """
    i = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device)
    frequencies = base ** (-i / size)
    if factors is not None:
        frequencies = frequencies / factors.to(torch.float64)
    return positions.to(torch.float64)[:, None] * frequencies


def apply_rope(x: torch.Tensor, angles: torch.Tensor, kind: RopeKind) -> torch.Tensor:
    """Rotate the first 2 * angles.shape[1] dimensions of x [T, H, D]; `norm` neighbours, `neox` halves."""
    half = angles.shape[1]
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    if kind == "norm":
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = rotated[..., :half], rotated[..., half:]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat((turned, rest), -1)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return torch.nn.functional.silu(gate) * up
