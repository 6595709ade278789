"""What a default `verify diff` takes on this machine's CPU, and where its time goes.

    python benchmarks/diff_cpu.py [--beside TREE] [--candidate SPEC] [--shape NAME] [--runs 1]
        [--out benchmarks/results/diff-cpu.json]

Each run in a process of its own, with two threads (and so two processes where kernels are ours).
--beside: the same of another checkout, in turn with this one, so that both meet the same load. CPU seconds
are of all processes of a run, user and system; they grow too where other processes share cores and caches,
less than the wall's do. Exit code 0 where both give the same verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commit import commit, write_result

from verify.machine.environment import describe

HERE = Path(__file__).resolve().parents[1]


def timed_run(tree: Path, more: Sequence[str]) -> dict[str, Any]:
    """One run of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        run_folder = Path(folder) / "run"
        command = [sys.executable, "-m", "verify", "diff", "--device", "cpu", "--out", str(run_folder), *more]
        load, started = os.getloadavg()[0], time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "2"}
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment, cwd=folder)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        run = json.loads((run_folder / "run.json").read_text())
    by_length: dict[str, float] = {}
    for stage in run["seconds"].values():
        for n_kv, seconds in stage.items():
            by_length[n_kv] = by_length.get(n_kv, 0.0) + seconds
    return {
        "exit_code": process.returncode,
        "verdict": run["verdict"],
        # Of other processes, when it began.
        "load": load,
        "wall_s": wall,
        "cpu_s": used.ru_utime + used.ru_stime,
        "cells": len(run["cells"]),
        "detectable": run["detectable"],
        "stages_s": {name: stage["all"] for name, stage in run["seconds"].items()},
        "lengths_s": by_length,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path, help="another checkout")
    parser.add_argument("--beside-commit", default="", help="what it is called in the result")
    parser.add_argument("--candidate", help="default: that of verify diff")
    parser.add_argument("--shape", help="likewise")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    options = {"--candidate": given.candidate, "--shape": given.shape}
    more = [word for option, value in options.items() if value for word in (option, value)]
    trees = {"this": HERE, **({"beside": given.beside.resolve()} if given.beside else {})}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for _ in range(given.runs):
        for name, tree in reversed(trees.items()):
            runs[name].append(timed_run(tree, more))
    result = {
        # Where checkouts and kernels lie on this machine is nobody's business.
        "command": " ".join(["python", *(re.sub("/.*/", "", word) for word in sys.argv)]),
        "commit": commit(),
        "beside_commit": given.beside_commit,
        "environment": describe("cpu"),
        **runs,
    }
    write_result(result, given.out)
    return 0 if len({run["verdict"] for of in runs.values() for run in of}) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
