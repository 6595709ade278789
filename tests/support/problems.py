"""Small attention problems for the tests of kernels."""

from __future__ import annotations

import torch

from verify.kernels.call import Call, checked_call


def problem(
    *,
    batch: int = 1,
    rows: int = 70,
    kv_heads: int = 2,
    ratio: int = 3,
    size: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    path: str = "decode",
    sharpness: float = 1.0,
    **options: object,
) -> Call:
    """Causal self-attention over `rows` tokens of Gaussian q, k, v: row t sees keys 0 .. t."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(batch, rows, heads, size, generator=generator).to(dtype)

    q, k, v = draw(kv_heads * ratio) * sharpness, draw(kv_heads), draw(kv_heads)
    kv_len = torch.arange(1, rows + 1, dtype=torch.int32).expand(batch, -1).contiguous()
    return checked_call(q, k, v, kv_len=kv_len, scale=size**-0.5, path=path, **options)  # type: ignore[arg-type]
