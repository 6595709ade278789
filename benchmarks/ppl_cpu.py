"""How fast `verify ppl` is on this machine's CPU, beside what its matrix products could reach.

    python benchmarks/ppl_cpu.py -f wiki.test.raw [--busy 2] [--out benchmarks/results/ppl_cpu.json]

Runs `verify ppl` with its defaults in a process of its own, and times a float32 product of 2048 x 2048
matrices on the same threads before and after it. CPU seconds are of that process and what it started, user
and system: what else runs changes them little. --busy N: once more beside N loops that do nothing but run.
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

from commit import commit, write_result

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


def timed_run(file: str | None) -> dict[str, Any]:
    """One run: its seconds, of the wall and of the CPU, and what it says of itself."""
    with tempfile.TemporaryDirectory() as folder:
        run_folder = Path(folder) / "run"
        command = [sys.executable, "-m", "verify", "ppl", "--device", "cpu", "--out", str(run_folder)]
        command += ["-f", file] if file else []
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = code = os.waitstatus_to_exitcode(status)
        run = json.loads((run_folder / "run.json").read_text())
    speed = run["speed"]
    return {
        "exit_code": code,
        "verdict": run["verdict"],
        "wall_s": wall,
        "cpu_s": used.ru_utime + used.ru_stime,
        "seconds": speed["seconds"],
        "arms": len(run["arms"]),
        "product_flop": speed["product_flop"],
        "product_flop_per_s": speed["product_flop_per_s"],
        "anonymous_bytes": speed["anonymous_bytes"],
    }


def beside_loops(count: int, file: str | None) -> dict[str, Any]:
    """The same beside so many processes that never wait."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        return timed_run(file)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-f", "--file", help="text; default: that of verify ppl")
    parser.add_argument("--busy", type=int, default=0, help="once more, beside so many busy loops")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prepare_variables()
    prepare_torch()
    before = product_rate()
    load = os.getloadavg()[0]
    alone = timed_run(arguments.file)
    after = product_rate()
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "environment": describe("cpu"),
        # Of other processes, when it began.
        "load": load,
        **alone,
        "matmul_2048_flop_per_s": [before, after],
        "share_of_matmul": alone["product_flop_per_s"] / max(before, after),
    }
    if arguments.busy:
        busy = beside_loops(arguments.busy, arguments.file)
        result["beside_busy_loops"] = {"loops": arguments.busy, **busy}
        result["times_as_long"] = busy["wall_s"] / alone["wall_s"]
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
