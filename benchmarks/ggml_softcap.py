"""Softcaps in a built ggml, by head size and length: refused, broken, or within its budget?

    python benchmarks/ggml_softcap.py --lib libggml.so [--backend cuda] [--out FILE.json]

llama.cpp's CUDA kernels with a softcap are compiled for head sizes 128 and 256 alone (later 512): there the
results must be right, other sizes are refused (`CUDA_SOFTCAP_SIZES`). The CPU's take all. Each call has a
kernel of its own: a library that ends its process is loaded anew. Beside each, the same call without the cap.
Exit 1 where a call is neither refused nor within its budget.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from commit import commit

from verify.kernels.budget.bound import error_budget
from verify.kernels.errors import KernelFailure
from verify.kernels.heads import Heads
from verify.kernels.judging.detectors import findings, measure
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel
from verify.machine.environment import prepare_torch

HEAD_SIZES, LENGTHS, CAPS = (64, 80, 96, 128, 256), (512, 8192), (None, 5.0, 50.0)


def tried(spec: str, size: int, n_kv: int, cap: float | None) -> dict[str, Any]:
    """What comes of one call: rows of 24 heads over 2, logits of standard deviation 6."""
    heads = Heads.grouped(kv=2, ratio=12, k_size=size, v_size=size)
    sizes = InputSizes(n_kv=(n_kv, n_kv - 37), heads=heads, edges=())
    call = replace(draw("softcap", sizes, 0), softcap=cap)
    row: dict[str, Any] = {"head_size": size, "n_kv": n_kv, "softcap": cap}
    kernel = build_kernel(spec)
    try:
        result = kernel.run(call)
    except KernelFailure as failure:
        return row | {"state": "refused" if failure.kind == "unsupported" else "broken", "said": str(failure)}
    finally:
        kernel.close()
    arithmetic = kernel.arithmetic_of(call)
    budget = error_budget(call, arithmetic)
    measured = measure(
        call, replace(result, lse=budget.lse.float()), arithmetic, distinct=True, budget=budget
    )
    said = [f"{f.detector}: {f.said}" for f in findings(measured) if f.detector in ("budget", "rms", "gain")]
    error = (result.out.double() - budget.out).norm() / budget.out.norm()
    figures = {"relative_error": float(error), "err_over_budget": measured.budget, "rms": measured.rms}
    return row | {"state": "broken" if said else "within", "said": "; ".join(said), **figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lib", required=True)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prepare_torch()
    spec = f"ggml:lib={arguments.lib},backend={arguments.backend}"
    rows = [tried(spec, d, n, cap) for d in HEAD_SIZES for n in LENGTHS for cap in CAPS]
    for row in rows:
        error = row.get("relative_error", math.nan)
        print(f"{row['head_size']:4} {row['n_kv']:6} cap {row['softcap']!s:5} {row['state']:8} {error:9.2e}",
              row["said"][:120])  # fmt: skip
    if arguments.out:
        found = {"commit": commit(), "backend": arguments.backend, "torch": torch.__version__, "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(row["state"] == "broken" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
