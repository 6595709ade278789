"""Runs of `verify diff` on right kernels whose true ratio is known: is one of them called broken, or
degraded?

    python benchmarks/clean_runs.py [--runs 1000] [--seconds 1e9] [--out benchmarks/results/clean-runs.json]

Each run is a pair of `eager` kernels with random plans, types of P and of the result, a shape, a length,
some families and a seed. The true ratio of each stratum is that of many rows of other draws. A pair is
*clean* where it is at most 1.1 in every stratum; where it is above the margin in one it must be called
degraded, and what lies between may be called either. About a second a run on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import torch
from commit import commit

from verify.diff.cells import compare, joined
from verify.diff.examining import examine
from verify.diff.inputs import DiffSettings, all_inputs
from verify.diff.run import run_diff
from verify.judge.strata import Stratum, judge_strata
from verify.judge.verdict import DEFAULT_MARGIN
from verify.kernels.judging.families import FAMILIES
from verify.kernels.registry import build_kernel
from verify.machine.environment import prepare_torch
from verify.machine.stages import StageClock

CLEAN = 1.1
SHAPES = ("2/1x32", "6/2x32", "4/4x64", "12/1x64")
LENGTHS = (64, 130, 300, 512)
# Rows and draws of the truth.
TRUE_ROWS, TRUE_DRAWS = 256, 3
OPTIONS = {
    "kv": ("1", "2", "3", "4", "size:64"),
    "block": ("16", "32", "64", "128"),
    "p": ("f16", "f16", "bf16", "f32"),
    "out": ("f32", "f16"),
}


def pair_of(rng: np.random.Generator) -> tuple[str, str]:
    """Two kernels that differ in one or two options."""
    one = {name: str(rng.choice(values)) for name, values in OPTIONS.items()}
    other = dict(one)
    for name in rng.choice(list(OPTIONS)[:3], int(rng.integers(1, 3)), replace=False):
        other[name] = str(rng.choice(OPTIONS[name]))
    # A type that is written is obeyed; both have the same.
    return tuple("eager:" + ",".join(f"{k}={v}" for k, v in x.items()) for x in (one, other))  # type: ignore[return-value]


@cache
def true_strata(baseline: str, candidate: str, shape: str, n_kv: int, family: str) -> tuple[Stratum, ...]:
    """Many rows of other draws than a run has."""
    settings = DiffSettings(
        shapes=(shape,),
        n_kvs=(n_kv,),
        families=(family,),
        baseline=baseline,
        candidates=(candidate,),
        device="cpu",
        seeds=TRUE_DRAWS,
        first_seed=10_000,
        rows=TRUE_ROWS,
    )
    clock, kernels = StageClock(torch.device("cpu")), [build_kernel(baseline), build_kernel(candidate)]
    draws = []
    for inputs in all_inputs(settings, torch.device("cpu"), clock):
        reference, found = examine(kernels, inputs, clock)  # type: ignore[arg-type]
        if reference is None or found is None:
            continue
        stratum = compare(inputs, reference, found).stratum  # type: ignore[arg-type]
        draws += [stratum] if stratum is not None else []
    return (joined(draws),) if draws else ()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/clean-runs.json"))
    arguments = parser.parse_args()
    prepare_torch()
    rng = np.random.default_rng(arguments.seed)
    families = [name for name, family in FAMILIES.items() if family.distinct]
    device, began = torch.device("cpu"), time.monotonic()
    counts: dict[str, Counter[str]] = {"clean": Counter(), "between": Counter(), "above": Counter()}
    wrong = []
    while sum(counts["clean"].values()) < arguments.runs and time.monotonic() - began < arguments.seconds:
        baseline, candidate = pair_of(rng)
        if baseline == candidate:
            continue
        settings = DiffSettings(
            shapes=(str(rng.choice(SHAPES)),),
            n_kvs=(int(rng.choice(LENGTHS)),),
            families=tuple(rng.choice(families, 4, replace=False).tolist()),
            baseline=baseline,
            candidates=(candidate,),
            device="cpu",
            first_seed=int(rng.integers(5000)),
        )
        clock = StageClock(device)
        verdict = run_diff(settings, device, all_inputs(settings, device, clock), clock).verdict
        key = settings.shapes[0], settings.n_kvs[0]
        strata = [s for family in settings.families for s in true_strata(baseline, candidate, *key, family)]
        worst = max((s.ratio for s in judge_strata(strata, DEFAULT_MARGIN).strata), default=1.0)
        kind = "clean" if worst <= CLEAN else "above" if worst > DEFAULT_MARGIN else "between"
        counts[kind][verdict] += 1
        if (kind == "clean" and verdict in ("broken", "degraded")) or verdict == "broken":
            wrong.append({"true_ratio": worst, "verdict": verdict, "kind": kind, "settings": repr(settings)})
    result = {"commit": commit(), "seed": arguments.seed, "counts": counts, "wrong": wrong}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
