"""How long `verify.check_attention` takes with its defaults, kernel by kernel.

    python benchmarks/check_time.py [--device cuda] [--baseline eager] [--out FILE.json]

Wall and CPU seconds of the first check of a process (libraries loaded, kernels compiled) and of one after it.
On a machine with other work the CPU seconds are what to go by.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import verify


def sdpa(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> Any:
    """torch's own operator, given a mask of lengths."""
    seen = torch.arange(k.shape[1], device=q.device) < kv_len[:, None, :, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def newest_key_lost(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float) -> Any:
    return sdpa(q, k, v, kv_len=kv_len - (kv_len > 64).int(), scale=scale)


KERNELS: dict[str, Any] = {"sdpa": sdpa, "newest key lost": newest_key_lost, "flash:kv=2": "flash:kv=2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=list(KERNELS))
    parser.add_argument("--baseline", help="kernel specification; default: check_attention's own")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    where = torch.cuda.get_device_name() if asked.device == "cuda" else platform.processor() or "cpu"
    found: dict[str, Any] = {"device": where, "torch": torch.__version__, "threads": torch.get_num_threads()}
    for name, fn in KERNELS.items() if asked.only is None else [(asked.only, KERNELS[asked.only])]:
        runs = []
        for _ in range(2):
            wall, cpu = time.monotonic(), time.process_time()
            report = verify.check_attention(fn, device=asked.device, baseline=asked.baseline)
            runs.append({"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu})
            took = " s, CPU ".join(f"{runs[-1][kind]:.1f}" for kind in ("wall", "cpu"))
            print(f"{name}: {report.verdict}, {took} s", flush=True)
        found[name] = {"verdict": report.verdict, "runs": runs}
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
