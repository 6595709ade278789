"""Planted flips: texts that right and wrong kernels change, and what `verify explain` says of them.

Every position of a real text is a prompt, and what a kernel prefers there the first token of a greedy text. A
window goes once through exact attention, the draws that `verify.explain.flips` estimates rounding from, right
kernels that are none of these, and faults. A flip is a position at which a kernel prefers another token than
exact attention does; p says how rare a move as large as its margin is for rounding.

    python benchmarks/planted_flips.py -f wiki.test.raw -c 256 --windows 8

Prints, for right kernels: flips, how many have p >= 1e-3 (`tie`) and p < 1e-6 (`not explained`), the flips
that the probabilities add up to, and how often the moves of *all* positions exceed the quantiles of Student's
distribution (calibration). For faults: windows with a flip of p < 1e-6, and flips that would be ties.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from verify.explain.flips import COMMON, DRAWS, PRIOR, TOO_RARE, walk_window
from verify.explain.reference import BASELINE, EXACT, Pass, ReferencePasses, divergences
from verify.kernels.call import Call
from verify.kernels.faults.altered import (
    AlteredKernel,
    newest_key_unseen,
    next_heads_keys,
    oldest_key_twice,
    scaled,
)
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel
from verify.machine.environment import prepare_torch


def altered(alter: Callable[[Call], Call]) -> Callable[[], Kernel]:
    return lambda: AlteredKernel(f"{BASELINE} altered", build_kernel(BASELINE), alter)


RIGHT = (
    Pass("right: kv=5", spec="flash:kv=5"),
    Pass("right: acc=f16,kv=5", spec="flash:acc=f16,kv=5"),
    Pass("right: p=bf16,kv=5", spec="flash:p=bf16,kv=5"),
    Pass("right: p=bf16,heads=split", spec="flash:p=bf16,heads=split"),
)
WRONG = (
    Pass("newest key unseen", spec="fault", build=altered(newest_key_unseen)),
    Pass("oldest key twice", spec="fault", build=altered(oldest_key_twice)),
    Pass("wrong KV head", spec="fault", build=altered(next_heads_keys)),
    Pass("scale 1.01", spec="fault", build=altered(scaled(1.01))),
    Pass("scale 1.001", spec="fault", build=altered(scaled(1.001))),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-m", "--model")
    parser.add_argument("-f", "--file", type=Path, required=True)
    parser.add_argument("-c", "--ctx-size", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--skip", type=int, default=0, help="windows passed over")
    parser.add_argument("--device")
    given = parser.parse_args()
    prepare_torch()
    reference = ReferencePasses(given.model, given.device)
    ids = reference.tokenizer.encode(given.file.read_bytes().decode()).tolist()
    degrees = len(DRAWS) + PRIOR
    p_of: dict[str, list[np.ndarray]] = {w.name: [] for w in (*RIGHT, *WRONG)}
    kld: dict[str, list[float]] = {w.name: [] for w in (*RIGHT, *WRONG)}
    expected, positions, moves = 0.0, 0, []
    for window in range(given.skip, given.skip + given.windows):
        tokens = ids[window * given.ctx_size : (window + 1) * given.ctx_size]
        seen = walk_window(reference, tokens)
        positions += len(tokens)
        expected += seen.expected
        exact = reference.logits(tokens, EXACT, len(tokens))
        for way in (*RIGHT, *WRONG):
            logits = reference.logits(tokens, way, len(tokens))
            kld[way.name].append(float(divergences(logits, exact).mean()))
            p_of[way.name].append(seen.p_of(logits))
            if way in RIGHT:
                moves.append(np.abs(seen.moves_of(logits)))
        print(f"window {window + 1} done", flush=True)
    print(
        f"{reference.name}: {given.windows} windows of {given.ctx_size}, {positions} positions,"
        f" {reference.device}"
    )
    print(f"flips that rounding makes, by the stated probabilities: {expected:.2f} a kernel")
    for way in (*RIGHT, *WRONG):
        p = np.concatenate(p_of[way.name])
        unexplained = sum(bool((x < TOO_RARE).any()) for x in p_of[way.name])
        print(
            f"{way.name}: mean KLD {np.mean(kld[way.name]):.2e}; {len(p)} flips: {(p >= COMMON).sum()} ties,"
            f" {(p < TOO_RARE).sum()} not explained; windows not explained {unexplained} of {given.windows}"
        )
    z = np.concatenate(moves)
    for share in (0.5, 0.1, 0.01, 1e-3, 1e-4):
        limit = stats.t.isf(share / 2, degrees)
        print(
            f"moves of right kernels beyond the {share:g} quantile: {(z > limit).mean():.2g} ({len(z)} moves)"
        )
    tie = stats.t.isf(COMMON / 2, degrees)
    beyond = np.clip(z - tie, 0, None).mean() / z.mean()
    print(f"share of flips by rounding that would not be ties, from these moves: {beyond:.2g}")
    reference.close()


if __name__ == "__main__":
    main()
