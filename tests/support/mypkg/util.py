"""What a kernel of this package needs from beside it."""

import math

import torch


def softmax_v(s, v):
    return torch.einsum("bths,bshd->bthd", s.softmax(-1), v)


def shared(x, heads):
    """[B, S, Hkv, D] as [B, S, Hq, D] in float32."""
    return x.float().repeat_interleave(heads // x.shape[2], 2)


def masked(s, seen):
    return s.masked_fill(~seen, -math.inf)
