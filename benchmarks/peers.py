"""Decode attention of other libraries, each as a function that builds one captured call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from verify.kernels.call import checked_call
from verify.kernels.registry import build_kernel

Call = Callable[[], torch.Tensor]
Build = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], Call]


def _build(spec: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Call:
    """The library's kernel alone: its launcher converts nothing."""
    kv_len = torch.full((1, 1), k.shape[1], dtype=torch.int32, device=q.device)
    launch = build_kernel(spec).ready(checked_call(q, k, v, kv_len=kv_len, scale=scale)).launch
    return lambda: launch().out


# q [1, 1, Hq, D], k and v [1, n_kv, Hkv, D]; the result is [1, 1, Hq, D].
PEERS: dict[str, Build] = {
    name: partial(_build, name) for name in ("sdpa:cudnn", "sdpa:flash", "flashinfer", "flex")
}
