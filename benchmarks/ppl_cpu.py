"""How fast `verify ppl` is on this machine's CPU, beside what its matrix products could reach.

    python benchmarks/ppl_cpu.py -f wiki.test.raw [--out benchmarks/results/ppl_cpu.json]

Runs `verify ppl` with its defaults in a process of its own, and times a float32 product of 2048 x 2048
matrices on the same threads before and after it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from commit import commit

from verify.machine.environment import describe, prepare_torch, prepare_variables

SIZE, REPEATS = 2048, 10


def product_rate() -> float:
    """Operations a second of a float32 product, the best of REPEATS."""
    import torch

    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    out = torch.empty(SIZE, SIZE)
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    return 2 * SIZE**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-f", "--file", help="text; default: that of verify ppl")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prepare_variables()
    prepare_torch()
    before = product_rate()
    with tempfile.TemporaryDirectory() as folder:
        run_folder = Path(folder) / "run"
        command = [sys.executable, "-m", "verify", "ppl", "--device", "cpu", "--out", str(run_folder)]
        command += ["-f", arguments.file] if arguments.file else []
        started = time.perf_counter()
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        wall = time.perf_counter() - started
        run = json.loads((run_folder / "run.json").read_text())
    after = product_rate()
    speed = run["speed"]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "environment": describe("cpu"),
        "exit_code": code,
        "verdict": run["verdict"],
        "wall_s": wall,
        "seconds": speed["seconds"],
        "arms": len(run["arms"]),
        "product_flop_per_s": speed["product_flop_per_s"],
        "matmul_2048_flop_per_s": [before, after],
        "share_of_matmul": speed["product_flop_per_s"] / max(before, after),
        "anonymous_bytes": speed["anonymous_bytes"],
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
