"""How fast `verify ppl` is on a GPU, stage by stage, beside the float32 products that the GPU reaches.

    python benchmarks/ppl_cuda.py -f wiki.test.raw [-c 512 8192] [--profile] [--out FILE.json]

Runs `verify ppl --chunks -1` on the decode path in a process of its own, once for each context: exact, floor,
baseline, control and candidate over the whole text, from start to report. A float32 product of 8192 x 8192
matrices (TF32 off) is timed on the same GPU before and after. --profile runs it once more under torch's
profiler and adds the operations that took most time on the GPU and on the host.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from commit import commit, write_result

from verify.machine.environment import describe, prepare_torch, prepare_variables

SIZE, REPEATS, SHOWN = 8192, 5, 30


def product_rate(rows: int = SIZE, inner: int = SIZE, columns: int = SIZE) -> float:
    """Operations a second of a float32 product on the GPU, the best of REPEATS."""
    import torch

    a = torch.randn(rows, inner, device="cuda")
    b = torch.randn(inner, columns, device="cuda")
    out = torch.empty(rows, columns, device="cuda")
    best = float("inf")
    for _ in range(REPEATS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.mm(a, b, out=out)
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000)
    return 2.0 * rows * inner * columns / best


def arguments_of(n_ctx: int, file: str | None, folder: Path, more: list[str]) -> list[str]:
    found = ["ppl", "--device", "cuda", "--chunks", "-1", "-c", str(n_ctx), "--out", str(folder), *more]
    return [*found, *(["-f", file] if file else [])]


def timed_run(n_ctx: int, file: str | None, more: list[str]) -> dict[str, Any]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "run"
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "verify", *arguments_of(n_ctx, file, folder, more)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        wall = time.perf_counter() - started
        if not (folder / "run.json").is_file():
            raise SystemExit(f"verify ppl ended with {done.returncode}:\n{done.stderr}")
        run = json.loads((folder / "run.json").read_text())
    speed = run["speed"]
    return {
        "n_ctx": n_ctx,
        "windows": run["corpus"]["windows"],
        "arms": [arm["name"] for arm in run["arms"]],
        "wall_s": wall,
        "seconds": speed["seconds"],
        "not_in_a_stage_s": wall - sum(speed["seconds"].values()),
        "stages_ended_at_s": speed["stages_ended_at_s"],
        "groups": speed["groups"],
        "group_windows": speed["group_windows"],
        "product_flop": speed["product_flop"],
        "product_flop_per_s": speed["product_flop_per_s"],
        "exit_code": done.returncode,
        "verdict": run["verdict"],
        "reasons": run["reasons"],
        "notes": run["notes"],
        "ppl": {arm["name"]: arm["ppl"] for arm in run["arms"]},
    }


def profiled(n_ctx: int, file: str | None, more: list[str]) -> dict[str, Any]:
    """The operations that take most time, in this process: tables of torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from verify.__main__ import main

    with tempfile.TemporaryDirectory() as work:
        sys.argv = ["verify", *arguments_of(n_ctx, file, Path(work) / "run", more)]
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            try:
                main()
            except SystemExit:
                torch.cuda.synchronize()
    averages = seen.key_averages()
    return {
        "n_ctx": n_ctx,
        "by_gpu_time": averages.table(sort_by="self_cuda_time_total", row_limit=SHOWN).splitlines(),
        "by_host_time": averages.table(sort_by="self_cpu_time_total", row_limit=SHOWN).splitlines(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-f", "--file", help="text; default: that of verify ppl")
    parser.add_argument("-c", "--ctx-size", type=int, nargs="+", default=[512])
    parser.add_argument("--profile", action="store_true", help="once more, under torch's profiler")
    parser.add_argument("--out", type=Path)
    known, more = parser.parse_known_args()
    prepare_variables()
    prepare_torch()
    before = product_rate()
    # The shapes of SmolLM2's layers, on the tiles that the runner gives them.
    shapes = {"576x576": (576, 576), "576x1536": (576, 1536), "1536x576": (1536, 576), "576x192": (576, 192)}
    by_shape = {name: product_rate(16384, *shape) for name, shape in shapes.items()}
    runs = [timed_run(n_ctx, known.file, more) for n_ctx in known.ctx_size]
    after = product_rate()
    for run in runs:
        if run["product_flop_per_s"]:
            run["share_of_matmul"] = run["product_flop_per_s"] / max(before, after)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "environment": describe("cuda"),
        "matmul_8192_flop_per_s": [before, after],
        "tile_16384_flop_per_s": by_shape,
        "runs": runs,
    }
    if known.profile:
        few = ["--chunks", "64"] if known.ctx_size[0] <= 1024 else ["--chunks", "4"]
        result["profiles"] = [profiled(known.ctx_size[0], known.file, [*more, *few])]
    write_result(result, known.out)


if __name__ == "__main__":
    main()
