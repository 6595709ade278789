"""Decode attention of other libraries, each as a function that builds one captured call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[], torch.Tensor]
Build = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], Call]


def _sdpa(backend: SDPBackend) -> Build:
    def build(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Call:
        by_head = [x.transpose(1, 2) for x in (q, k, v)]

        def call() -> torch.Tensor:
            with sdpa_kernel([backend]):
                return F.scaled_dot_product_attention(*by_head, scale=scale, enable_gqa=True)

        return call

    return build


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Call:
    by_head = [x.transpose(1, 2) for x in (q, k, v)]
    flex = _compiled_flex()
    return lambda: flex(*by_head, scale=scale, enable_gqa=True)


def _flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Call:
    import flashinfer  # type: ignore[import-not-found]

    return lambda: flashinfer.single_decode_with_kv_cache(
        q[0, 0], k[0], v[0], kv_layout="NHD", use_tensor_cores=True, sm_scale=scale
    )


# q [1, 1, Hq, D], k and v [1, n_kv, Hkv, D]; the result is [1, Hq, 1, D] or [Hq, D].
PEERS: dict[str, Build] = {
    "sdpa:cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa:flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "flashinfer": _flashinfer,
    "flex": _flex,
}
