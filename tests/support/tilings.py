"""Right kernels that tile in their own ways, as `py:` kernels, a few roundings apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

TILE = 64


def _cubic_exp(x: torch.Tensor) -> torch.Tensor:
    """exp by a cubic on [0, 1): 1e-4 relative, as a kernel without a fast exponential has it."""
    y = x * math.log2(math.e)
    whole = torch.floor(y)
    f = y - whole
    return torch.ldexp(1 + f * (0.69514614 + f * (0.22764614 + f * 0.07706813)), whole.clamp(min=-140).int())


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_len: torch.Tensor,
    scale: float,
    *,
    cuts: list[int] | None = None,
    exp: Callable[[torch.Tensor], torch.Tensor] = torch.exp,
    rounded_sum: bool = False,
) -> torch.Tensor:
    """cuts: where parts end that are merged as a tree; rounded_sum: the denominator adds up the rounded P."""
    ratio = q.shape[2] // k.shape[2]
    k, v = (x.float().repeat_interleave(ratio, 2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q.float(), k) * scale
    unseen = torch.arange(k.shape[1]) >= kv_len[:, None, :, None]
    logits = logits.masked_fill(unseen, -math.inf)
    ends = [0, *(cuts or []), k.shape[1]]
    parts = []
    for low, high in itertools.pairwise(ends):
        top = torch.full((*logits.shape[:3], 1), -1e30)
        total, out = torch.zeros_like(top), torch.zeros(*logits.shape[:3], v.shape[-1])
        for first in range(low, high, TILE):
            keys = slice(first, min(first + TILE, high))
            piece = logits[..., keys]
            new = torch.maximum(top, piece.amax(-1, keepdim=True))
            p = torch.where(piece > -math.inf, exp(piece - new), 0.0)
            short = p.half().float()
            total = total * torch.exp(top - new) + (short if rounded_sum else p).sum(-1, keepdim=True)
            out = out * torch.exp(top - new) + torch.einsum("bhts,bshd->bhtd", short, v[:, keys])
            top = new
        parts.append((top, total, out))
    while len(parts) > 1:
        parts = [
            _join(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)
        ]
    _, total, out = parts[0]
    return (out / total.clamp(min=1e-30)).transpose(1, 2)


Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _join(a: Part, b: Part) -> Part:
    top = torch.maximum(a[0], b[0])
    x, y = torch.exp(a[0] - top), torch.exp(b[0] - top)
    return top, a[1] * x + b[1] * y, a[2] * x + b[2] * y


def tree(q, k, v, *, kv_len, scale):  # type: ignore[no-untyped-def]
    cuts = [k.shape[1] * i // 7 for i in (1, 3, 4, 6)]
    return _attend(q, k, v, kv_len, scale, cuts=cuts)


def rounded_denominator(q, k, v, *, kv_len, scale):  # type: ignore[no-untyped-def]
    return _attend(q, k, v, kv_len, scale, rounded_sum=True)


def cubic(q, k, v, *, kv_len, scale):  # type: ignore[no-untyped-def]
    return _attend(q, k, v, kv_len, scale, exp=_cubic_exp)


def half(q, k, v, *, kv_len, scale):  # type: ignore[no-untyped-def]
    return _attend(q, k, v, kv_len, scale).half()


def brain(q, k, v, *, kv_len, scale):  # type: ignore[no-untyped-def]
    return _attend(q, k, v, kv_len, scale).bfloat16()
