"""`flash` on the path prefill beside cuDNN and FlashAttention-2, as torch has them, on the CUDA device here.

    python benchmarks/prefill.py --out FILE.json [--seconds 40]

Causal, one sequence, float16; times as in `decode.py`. TFLOP/s count the products that a causal mask leaves.
Nothing new is begun after `--seconds`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from commit import gpu_run, measure_lines
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from verify.kernels.call import checked_call
from verify.kernels.exact import exact_attention
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.heads import Heads
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.timing import time_calls

SHAPES = (Heads(96, 8, 128, 128), Heads(32, 8, 64, 64), Heads(16, 8, 256, 256), Heads(32, 8, 128, 128))
LENGTHS = (8192, 2048, 32_768, 512)
PEERS = {"sdpa:cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa:flash": SDPBackend.FLASH_ATTENTION}


def peer(backend: SDPBackend, *inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    by_head = [x.transpose(1, 2) for x in inputs]

    def launch() -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True)

    return launch


def measured(shape: Heads, n_kv: int) -> list[dict[str, Any]]:
    """A line a kernel, the peers first; the error of `flash` where float64 takes no time."""
    q, k, v = (
        torch.randn(1, n_kv, heads, shape.k_size, device="cuda", dtype=torch.float16)
        for heads in (shape.q, shape.kv, shape.kv)
    )
    rows = torch.arange(1, n_kv + 1, dtype=torch.int32, device="cuda")[None]
    call = checked_call(q, k, v, kv_len=rows, scale=shape.k_size**-0.5, path="prefill")
    ready = FlashKernel("flash", TileOptions()).prepare(call)
    assert ready is not None
    kernels = {name: peer(backend, q, k, v) for name, backend in PEERS.items()} | {"flash": ready.launch}
    products = 2 * shape.q * (shape.k_size + shape.v_size) * n_kv * (n_kv + 1) / 2
    lines: list[dict[str, Any]] = []
    for name, launch in kernels.items():
        line: dict[str, Any] = {"shape": str(shape), "n_kv": n_kv, "kernel": name}
        try:
            us = time_calls([launch], replays=7).median_us
            line |= {"us": round(us, 1), "tflop_s": round(products / us / 1e6, 1)}
        except Exception as error:  # one that does not run is a line of the table
            line["failed"] = f"{type(error).__name__}: {error}"[:160]
        lines.append(line)
    best = min((line["us"] for line in lines[:-1] if "us" in line), default=None)
    if best is not None and "us" in lines[-1]:
        lines[-1]["of_best_peer"] = round(best / lines[-1]["us"], 4)
    lines[-1]["tiles"] = list(ready.tiles)
    if n_kv <= 2048:
        due, found = exact_attention(call).out, ready.launch().out
        lines[-1]["error"] = float((found.double() - due).norm() / due.norm())
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=40)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    result: dict[str, Any] = {**gpu_run(SHAPES[0]), "lines": []}
    calls = [partial(measured, shape, n_kv) for shape in SHAPES for n_kv in LENGTHS]
    measure_lines(result, calls, seconds=arguments.seconds, out=arguments.out)


if __name__ == "__main__":
    main()
