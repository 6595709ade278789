"""Runs of `verify diff` on right kernels whose true ratio is known: is one of them called broken, or
degraded?

    python benchmarks/clean_runs.py [--runs 1000] [--seconds 1e9] [--out benchmarks/results/clean-runs.json]

A setting is a pair of `eager` kernels with random plans, types of P and of the result, a shape, a length
and some families; a run is one seed of it, and each setting has `SEEDS` of them. The true ratio of each
stratum is that of many rows of other draws. A pair is *clean* where it is at most 1.1 in every stratum; where
it is above the margin in one it must be called degraded (`undecided` holds those that are not, with their
reasons and the true ratio), and what lies between may be called either. Settings are numbered: what the file
holds is gone on with, so that a run that was stopped loses one setting at most.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from commit import commit

from verify.diff.cells import joined, stratum_of
from verify.diff.examining import CellInputs, KernelEvidence, row_energy
from verify.diff.inputs import DiffSettings, all_inputs
from verify.diff.run import run_diff
from verify.judge.strata import Stratum, judge_strata
from verify.judge.verdict import DEFAULT_MARGIN
from verify.kernels.exact import exact_attention
from verify.kernels.judging.families import FAMILIES
from verify.kernels.registry import build_kernel
from verify.machine.environment import prepare_torch
from verify.machine.stages import StageClock

CPU = torch.device("cpu")
CLEAN = 1.1
# Small, so that a run is a fraction of a second: what is judged are the statistics, not the sizes.
SHAPES = ("2/1x16", "4/2x16", "6/1x32", "4/4x32")
LENGTHS = (64, 100, 130, 203, 300)
FAMILIES_A_RUN, SEEDS = 4, 8
# Rows and draws of the truth.
TRUE_ROWS, TRUE_DRAWS = 256, 2
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


class CleanSetting(NamedTuple):
    """What a number stands for; the seeds follow from it too."""

    baseline: str
    candidate: str
    shape: str
    n_kv: int
    families: tuple[str, ...]
    seeds: tuple[int, ...]

    def of_diff(self, **more: Any) -> DiffSettings:
        return DiffSettings(
            shapes=(self.shape,),
            n_kvs=(self.n_kv,),
            families=self.families,
            baseline=self.baseline,
            candidates=(self.candidate,),
            device="cpu",
            **more,
        )


def setting_of(number: int, seed: int) -> CleanSetting:
    rng = np.random.default_rng((seed, number))
    baseline, candidate = pair_of(rng)
    while baseline == candidate:
        baseline, candidate = pair_of(rng)
    families = [name for name, family in FAMILIES.items() if family.distinct]
    return CleanSetting(
        baseline=baseline,
        candidate=candidate,
        shape=str(rng.choice(SHAPES)),
        n_kv=int(rng.choice(LENGTHS)),
        families=tuple(rng.choice(families, FAMILIES_A_RUN, replace=False).tolist()),
        seeds=tuple(int(x) for x in rng.choice(5000, SEEDS, replace=False)),
    )


def true_ratio(setting: CleanSetting) -> float:
    """The largest ratio of any stratum, from many rows of other draws than runs have: of their errors alone,
    which nothing is held against."""
    kernels = [build_kernel(setting.baseline), build_kernel(setting.candidate)]
    asked = setting.of_diff(seeds=TRUE_DRAWS, first_seed=10_000, rows=TRUE_ROWS)
    draws: dict[str, list[Stratum]] = {}
    for inputs in all_inputs(asked, CPU, StageClock(CPU)):
        assert isinstance(inputs, CellInputs)
        exact = exact_attention(inputs.call).out
        both = []
        for kernel in kernels:
            energy = row_energy(kernel.run(inputs.call).out, exact)
            of = KernelEvidence(kernel.spec, result_type=kernel.result_type(inputs.call), exact=exact)
            of.energy = of.given_energy = energy
            both.append(of)
        draws.setdefault(inputs.family, []).append(stratum_of(inputs, *both))
    strata = judge_strata([joined(each) for each in draws.values()], DEFAULT_MARGIN).strata
    return max((s.ratio for s in strata), default=1.0)


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
    torch.set_num_threads(1)
    began = time.monotonic()
    found: dict[str, Any] = {
        "seed": arguments.seed,
        "settings": 0,
        "counts": {},
        "wrong": [],
        "undecided": [],
    }
    if arguments.out.is_file():
        there = json.loads(arguments.out.read_text())
        found = there if there.get("seed") == arguments.seed and "settings" in there else found
    counts = {kind: Counter(found["counts"].get(kind, {})) for kind in ("clean", "between", "above")}
    while sum(counts["clean"].values()) < arguments.runs and time.monotonic() - began < arguments.seconds:
        setting = setting_of(found["settings"], arguments.seed)
        worst = true_ratio(setting)
        kind = "clean" if worst <= CLEAN else "above" if worst > DEFAULT_MARGIN else "between"
        for seed in setting.seeds:
            asked, clock = setting.of_diff(first_seed=seed), StageClock(CPU)
            outcome = run_diff(asked, CPU, all_inputs(asked, CPU, clock), clock)
            verdict = outcome.verdict
            counts[kind][verdict] += 1
            if verdict == "broken" or (kind == "clean" and verdict == "degraded"):
                wrong = {"true_ratio": worst, "verdict": verdict, "kind": kind, "seed": seed}
                found["wrong"].append({**wrong, "setting": setting._asdict()})
            if kind == "above" and verdict != "degraded":
                why = {"true_ratio": round(worst, 3), "verdict": verdict, "number": found["settings"]}
                reasons = outcome.candidates[0].reasons
                found["undecided"].append({**why, "seed": seed, "reasons": reasons})
        commits = sorted({*found.get("commits", ()), commit()})
        found |= {"commits": commits, "settings": found["settings"] + 1, "counts": counts}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
