"""Do the tests of strata hold? Row energies recorded from eager kernels, and runs of known truth on them.

    python benchmarks/strata.py --record            writes tests/support/row_energies.npz (seconds)
    python benchmarks/strata.py [--runs 20000] [--out benchmarks/results/strata.json]

Of each kind of rows and each true ratio, 1, the margin and 1/1.1: how often each 99.9 % limit misses it,
and of runs with a stratum of each kind how often one is called degraded or improved; the same of strata that
are doubled until they decide, in five looks. About 20 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from commit import commit

from verify.judge import strata
from verify.judge.verdict import DEFAULT_MARGIN
from verify.kernels.exact import exact_attention
from verify.kernels.heads import Heads
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.figures import smallest_squares
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.registry import build_kernel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.strata_runs import RECORDED, false_words, limit_misses, looks, made_kinds, recorded_kinds

# Kernels of like accuracy: what is asked of unlike ones is no question of a limit.
PAIRS = (
    ("eager:kv=4", "eager"),
    ("eager:block=32", "eager"),
    ("eager:p=bf16,kv=4", "eager:p=bf16"),
    ("eager:p=f32,kv=4", "eager:p=f32"),
    ("eager:out=f16,kv=4", "eager:out=f16"),
)
KEYS, ROWS = 512, 256
# True ratios of runs whose strata are doubled until they decide: all runs at the margin, whose rate is small,
# and of the others a tenth.
LOOKED_AT, FEWER = (1.0, 1.1, 1.2, 1.25, 1.4), 10


def record() -> None:
    """Mean square errors of rows and heads, as log2 in float16: a part in 50, no more."""
    specs = sorted({spec for pair in PAIRS for spec in pair})
    families = [name for name, family in FAMILIES.items() if family.distinct]
    sizes = InputSizes(
        n_kv=(KEYS,) * ROWS,
        heads=Heads.grouped(kv=2, ratio=2, k_size=64, v_size=64),
        edges=(64, 128, 256, 384),
    )
    energy = np.zeros((len(specs), len(families), ROWS, 4))
    floor = np.zeros_like(energy)
    for j, family in enumerate(families):
        call = draw(family, sizes, 0)
        exact = exact_attention(call).out
        for i, spec in enumerate(specs):
            kernel = build_kernel(spec)
            error = kernel.run(call).out.double() - exact
            energy[i, j] = error.square().mean(-1)[0].numpy()
            floor[i, j] = smallest_squares(exact, kernel.arithmetic_of(call).out)[0].numpy()
    least = 2.0**-200
    np.savez_compressed(
        RECORDED,
        energy=np.log2(np.maximum(energy, least)).astype(np.float16),
        floor=np.log2(np.maximum(floor, least)).astype(np.float16),
        specs=specs,
        families=families,
        pairs=np.array(PAIRS),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/strata.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.record:
        record()
        return
    made, recorded = made_kinds(np.random.default_rng(1)), recorded_kinds()
    limits = []
    for samples in (32, 64):
        limits += limit_misses([*made, *recorded], runs=arguments.runs, samples=samples)
    limits += limit_misses(made, runs=arguments.runs, samples=8, lengths=3)
    words = [
        one
        for samples in (32, 64)
        for one in false_words([*made, *recorded], runs=arguments.runs, samples=samples)
    ]
    doubled = [
        one
        for ratio in LOOKED_AT
        for one in looks(
            [*made, *recorded],
            runs=arguments.runs if ratio == DEFAULT_MARGIN else arguments.runs // FEWER,
            samples=64,
            looks=5,
            ratios=[ratio],
        )
    ]
    result = {
        "commit": commit(),
        "runs": arguments.runs,
        "constants": {
            name: getattr(strata, name)
            for name in ("ALPHA", "FEWEST_SAMPLES", "PRIOR_DISPERSION", "WIDENING")
        },
        "limits": [one._asdict() for one in limits],
        "words": [one._asdict() for one in words],
        "looks": [one._asdict() for one in doubled],
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for one in sorted(limits, key=lambda x: -max(x.upper, x.lower))[:12]:
        print(f"{one.kind:50} R = {one.truth:6} {one.samples:4} rows: {one.upper:.2%} {one.lower:.2%}")
    for said in (*words, *doubled):
        print(said)


if __name__ == "__main__":
    main()
