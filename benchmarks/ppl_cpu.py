"""How fast `verify ppl` is on this machine's CPU, beside what its matrix products could reach.

    python benchmarks/ppl_cpu.py -f wiki.test.raw [--busy 2] [--out benchmarks/results/ppl_cpu.json]

Runs `verify ppl` with its defaults in a process of its own, and times a float32 product of 2048 x 2048
matrices on one thread before and after it. CPU seconds are of that process and what it started, user and
system: what else runs changes them less than those of the wall. --busy N: once more beside N loops that do
nothing but run. --llama-perplexity PROGRAM --f32-model FILE: one pass of that engine in F32 on one thread,
and how many times its CPU seconds a run takes.
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
    """Operations a second of a float32 product on one thread, the best of REPEATS."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    out = torch.empty(SIZE, SIZE)
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - started)
    torch.set_num_threads(threads)
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
        "processes": speed["processes"],
        "threads_a_process": 1 if speed["processes"] > 1 else run["environment"]["threads"],
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


def engine_pass(program: str, model: str, file: str) -> dict[str, Any]:
    """One pass of an engine over the same windows, on one thread: its seconds, and what it says last."""
    command = [program, "-m", model, "-f", file, "-c", "512", "--chunks", "4", "-t", "1"]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        final = [line.strip() for line in said if "Final estimate" in line]
    return {
        "exit_code": process.returncode,
        "wall_s": wall,
        "cpu_s": used.ru_utime + used.ru_stime,
        "said": final[-1].partition("Final")[2] if final else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-f", "--file", help="text; default: that of verify ppl")
    parser.add_argument("--busy", type=int, default=0, help="once more, beside so many busy loops")
    parser.add_argument("--llama-perplexity", help="the program, for one pass of the same windows")
    parser.add_argument("--f32-model", help="the same model with weights in F32, for that")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prepare_variables()
    prepare_torch()
    before = product_rate()
    load = os.getloadavg()[0]
    alone = timed_run(arguments.file)
    after = product_rate()
    result = {
        "command": " ".join(["python", *(Path(x).name if x.startswith("/") else x for x in sys.argv)]),
        "commit": commit(),
        "environment": describe("cpu"),
        # Of other processes, when it began.
        "load": load,
        **alone,
        "matmul_2048_flop_per_s": [before, after],
        "share_of_matmul": alone["product_flop_per_s"] / (max(before, after) * alone["threads_a_process"]),
    }
    if arguments.llama_perplexity:
        engine = engine_pass(arguments.llama_perplexity, arguments.f32_model, arguments.file)
        result["llama_perplexity_f32"] = engine
        result["times_its_cpu_s"] = alone["cpu_s"] / engine["cpu_s"]
    if arguments.busy:
        busy = beside_loops(arguments.busy, arguments.file)
        result["beside_busy_loops"] = {"loops": arguments.busy, **busy}
        result["times_as_long"] = busy["wall_s"] / alone["wall_s"]
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
