"""`flash` over whole windows on the path decode, as `verify ppl` asks it, on the CUDA device here.

    python benchmarks/windows.py --out FILE.json [--seconds 40]

Float16, one row more a token; times as in `decode.py`. TFLOP/s count the products that a causal mask leaves;
`of_products`: their share of the rate of torch's float16 product of 8192 x 8192 x 8192.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from commit import gpu_run, measure_lines

from verify.kernels.call import checked_call
from verify.kernels.heads import Heads
from verify.kernels.registry import build_kernel
from verify.kernels.timing import time_calls

SMOL, GLM, LLAMA = Heads(9, 3, 64, 64), Heads(96, 8, 128, 128), Heads(32, 8, 128, 128)


class Windows(NamedTuple):
    heads: Heads
    count: int  # windows a call
    context: int  # tokens a window
    kernel: str


CALLS = (
    Windows(SMOL, 16, 512, "flash"),
    Windows(SMOL, 16, 512, "flash:heads=split,kv=4"),
    Windows(SMOL, 2, 8192, "flash"),
    Windows(SMOL, 2, 8192, "flash:heads=split,kv=4"),
    Windows(GLM, 1, 2048, "flash"),
    Windows(GLM, 1, 2048, "flash:heads=8+4,kv=4"),
    Windows(LLAMA, 1, 2048, "flash"),
)


def product_rate() -> float:
    """TFLOP/s of a large float16 product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    return 2 * 8192**3 / time_calls([lambda: a @ a], replays=5).median_us / 1e6


def measured(of: Windows, rate: float) -> list[dict[str, Any]]:
    """The line of the table; rate: TFLOP/s that a product reaches."""
    q, k, v = (
        torch.randn(of.count, of.context, heads, of.heads.k_size, device="cuda", dtype=torch.float16)
        for heads in (of.heads.q, of.heads.kv, of.heads.kv)
    )
    n_kv = torch.arange(1, of.context + 1, dtype=torch.int32, device="cuda").repeat(of.count, 1)
    call = checked_call(q, k, v, kv_len=n_kv, scale=of.heads.k_size**-0.5, path="decode")
    us = time_calls([build_kernel(of.kernel).ready(call).launch], replays=5).median_us
    sizes = of.heads.k_size + of.heads.v_size
    tflop_s = of.count * of.heads.q * sizes * of.context * (of.context + 1) / us / 1e6
    shape = f"{of.heads.q}/{of.heads.kv}x{of.heads.k_size}"
    line = {"shape": shape, "windows": of.count, "n_ctx": of.context, "kernel": of.kernel}
    return [
        line | {"us": round(us, 1), "tflop_s": round(tflop_s, 1), "of_products": round(tflop_s / rate, 3)}
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=40)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rate = product_rate()
    result: dict[str, Any] = {**gpu_run(SMOL), "product_tflop_s": round(rate, 1), "lines": []}
    calls = [partial(measured, call, rate) for call in CALLS]
    measure_lines(result, calls, seconds=arguments.seconds, out=arguments.out)


if __name__ == "__main__":
    main()
