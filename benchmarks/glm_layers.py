"""Layers of GLM-4.5-Air's shape at full width on a GPU: seconds a layer, and what disk, PCIe and GEMM allow.

    python benchmarks/glm_layers.py [--windows 64] [--work FOLDER] [--out FILE.json]

Writes two files with random blocks (Q8_0 attention, Q4_K and Q8_0 experts; 2.0 and 7.2 GB), one with three
layers of 128 experts more than the other, and runs `verify ppl` on each over the same windows of 512 tokens,
with the file dropped from the page cache before, once the kernels are compiled. A third of the difference is
one layer, for five arms: seven passes, as the control shares its baseline's states and three arms have a pass
with frozen casts. In the same run: the rate of reading the file from the disk, of copying pinned memory to
the GPU, and of float32 products of 8192 x 8192 and of an expert's tile. What is extrapolated from that is
called so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from commit import commit, write_result
from ppl_cuda import product_rate

from support.synthetic_moe import MoeSizes, write_moe
from verify.machine.environment import describe, prepare_torch, prepare_variables
from verify.model.architectures.experts import ON_GPU

AIR = {
    "width": 4096, "heads": 96, "kv_heads": 8, "head_size": 128,
    "inner": 10944, "experts": 128, "used": 8, "expert_inner": 1408,
}  # fmt: skip
AIR_LAYERS, N_CTX = 46, 512
# Exact, floor, baseline, candidate; and the last three with frozen casts.
PASSES = 7
MORE_LAYERS = 3
# GLM-4.7: 92 layers of width 5120 with 160 experts of 1536.
GLM_4_7 = AIR | {"width": 5120, "inner": 12288, "experts": 160, "expert_inner": 1536}
GLM_4_7_LAYERS = 92


def drop_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_rate(path: Path) -> float:
    """Bytes a second of reading the file from front to back, not from the page cache."""
    drop_cache(path)
    buffer = memoryview(bytearray(16 << 20))
    read, started = 0, time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(buffer):
            read += n
    return read / (time.perf_counter() - started)


def copy_rate() -> float:
    """Bytes a second from pinned memory to the GPU."""
    import torch

    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device="cuda")
    best = float("inf")
    for _ in range(4):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        there.copy_(host, non_blocking=True)
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000)
    return host.numel() / best


def run(model: Path, text: Path, windows: int, work: Path) -> dict[str, Any]:
    drop_cache(model)
    out = work / model.stem
    command = [sys.executable, "-m", "verify", "ppl", "-m", str(model), "-f", str(text), "-c", str(N_CTX)]
    command += ["--chunks", str(windows), "--device", "cuda", "--memory", "16G", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not (out / "run.json").is_file():
        raise SystemExit(f"verify ppl ended with {done.returncode}:\n{done.stderr}")
    found = json.loads((out / "run.json").read_text())
    speed = found["speed"]
    ended = speed["stages_ended_at_s"]
    return {
        "groups_s": ended["groups"] - ended["preparing"],
        "seconds": speed["seconds"],
        "product_flop": speed["product_flop"],
        "read_bytes": speed["read_bytes"],
        "groups": speed["groups"],
        "verdict": found["verdict"],
        "notes": found["notes"],
    }


def layer_of(sizes: dict[str, int], rows: int) -> tuple[float, float]:
    """Of a layer with experts: stored bytes, and operations of the products for so many rows, unpadded."""
    attention = sizes["width"] * sizes["head_size"] * 2 * (sizes["heads"] + sizes["kv_heads"])
    expert = 3 * sizes["width"] * sizes["expert_inner"]
    stored = (
        attention * 34 / 32 + sizes["experts"] * expert * (2 * 144 / 256 + 34 / 32) / 3 + expert * 18 / 32
    )
    return stored, 2.0 * rows * (attention + (sizes["used"] + 1) * expert + sizes["width"] * sizes["experts"])


def _a_layer(of_few: float, of_more: float) -> float:
    return (of_more - of_few) / MORE_LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--work", type=Path, help="folder on the disk that is meant, with 10 GB to spare")
    parser.add_argument("--out", type=Path)
    known = parser.parse_args()
    prepare_variables()
    prepare_torch()
    with tempfile.TemporaryDirectory(dir=known.work) as folder:
        work = Path(folder)
        files = [
            write_moe(work / f"{n}.gguf", MoeSizes(layers=1 + n, dense=1, **AIR))
            for n in (1, 1 + MORE_LAYERS)
        ]
        letters = np.random.default_rng(0).integers(97, 123, known.windows * N_CTX + N_CTX, dtype=np.uint8)
        text = work / "text.txt"
        text.write_bytes(letters.tobytes())
        disk = disk_rate(files[1])
        run(files[0], text, 8, work / "compiled")
        first, second = (run(file, text, known.windows, work / "measured") for file in files)
    gemm = product_rate()
    tile = product_rate(ON_GPU.tile, AIR["width"], AIR["expert_inner"])
    pcie = copy_rate()
    names = first["seconds"].keys() | second["seconds"].keys()
    layer = {n: _a_layer(first["seconds"].get(n, 0.0), second["seconds"].get(n, 0.0)) for n in sorted(names)}
    wall, stored, flop = (_a_layer(first[n], second[n]) for n in ("groups_s", "read_bytes", "product_flop"))
    rows = known.windows * N_CTX * PASSES
    air, other = layer_of(AIR, rows), layer_of(GLM_4_7, rows)
    reading = layer.get("reading", 0.0) + layer.get("weights", 0.0)
    rest = wall - reading - layer.get("products", 0.0)
    of_4_7 = reading * other[0] / air[0] + layer.get("products", 0.0) * other[1] / air[1] + rest
    limits = {"disk": stored / disk, "pcie": stored / pcie, "gemm": air[1] / gemm}
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "environment": describe("cuda"),
        "windows": known.windows,
        "n_ctx": N_CTX,
        "arms": 5,
        "passes": PASSES,
        "disk_bytes_per_s": disk,
        "pcie_bytes_per_s": pcie,
        "matmul_8192_flop_per_s": gemm,
        "expert_tile_flop_per_s": tile,
        "layer_s": wall,
        "layer_seconds_by_kind": layer,
        "layer_bytes": stored,
        "layer_product_flop": flop,
        "layer_flop_without_padding": air[1],
        "limits_s": limits,
        "share_of_slowest_limit": max(limits.values()) / wall,
        "product_flop_per_s": flop / layer["products"],
        "extrapolated": {
            "what": "layer_s times the layers; GLM-4.7 by its bytes and operations a layer; four GPUs share"
            " the windows and one reads, each taken to be as fast as this one",
            "glm_4_5_air_s": wall * AIR_LAYERS,
            "glm_4_7_s": of_4_7 * GLM_4_7_LAYERS,
            "glm_4_5_air_on_4_gpus_s": max(reading, (wall - reading) / 4 + 0.25 * reading) * AIR_LAYERS,
            "state_bytes_a_gpu_of_4": rows * AIR["width"] * 4 / 4,
        },
        "runs": [first, second],
    }
    write_result(result, known.out)


if __name__ == "__main__":
    main()
