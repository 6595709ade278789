"""Planted flips: texts that right and wrong kernels change, and what `verify explain` says of them.

Every position of a real text is a prompt, and what a kernel prefers there the first token of a greedy text. A
window goes once through exact attention, the draws that `verify.explain.flips` estimates rounding from, right
kernels that are none of these, and faults. A flip is a position at which a kernel prefers another token than
exact attention does; p says how rare a move as large as its margin is for rounding.

    python benchmarks/planted_flips.py -f wiki.test.raw -c 256 --windows 8

A window with a flip is a text that the kernel changes, as far as the model wrote it itself; what
`verify explain --texts` says of it is counted: tie, not explained, inconclusive. Beside it the flips that the
probabilities add up to, and how often the moves of *all* positions exceed the quantiles of Student's
distribution (calibration).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from commit import commit
from scipy import stats

from verify.explain.flips import (
    COMMON,
    DRAWS,
    PRIOR,
    Answer,
    Window,
    answer_of,
    together,
    walk_window,
)
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
from verify.machine.environment import describe, prepare_torch


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
    Pass("scale 1.05", spec="fault", build=altered(scaled(1.05))),
    Pass("scale 1.02", spec="fault", build=altered(scaled(1.02))),
    Pass("scale 1.01", spec="fault", build=altered(scaled(1.01))),
    Pass("scale 1.001", spec="fault", build=altered(scaled(1.001))),
)


@dataclass
class Seen:
    """A kernel's windows: what each diverges by, its flips, and what `verify explain` makes of them."""

    divergences: list[float] = field(default_factory=list)
    # Of every flip.
    p: list[float] = field(default_factory=list)
    # Of every window with a flip: a text that this kernel changes.
    answers: list[Answer] = field(default_factory=list)

    def add(self, window: Window, logits: torch.Tensor, divergence: float) -> None:
        self.divergences.append(divergence)
        at, p = window.flips_of(logits), window.p_of(logits)
        if not len(at):
            return
        self.p += p.tolist()
        # The place of the first is where the texts part: it was chosen because it is a flip.
        flips = dict(zip(at.tolist(), p.tolist(), strict=True))
        joined = together(window.ratios, window.degrees, flips, int(at[0]))
        self.answers.append(answer_of(float(p.min()), joined, len(p)))

    def line(self) -> str:
        counts = ", ".join(f"{n} {answer}" for answer, n in Counter(self.answers).items())
        return (
            f"mean KLD {np.mean(self.divergences):.2e}; {len(self.p)} flips, of which rounding explains"
            f" {sum(p >= COMMON for p in self.p)}; of {len(self.answers)} changed texts: {counts or 'none'}"
        )

    def to_json(self) -> dict[str, object]:
        return {
            "mean_kld": float(np.mean(self.divergences)),
            "changed_texts": dict(Counter(self.answers)),
            "flips": len(self.p),
            "flip_p": self.p,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-m", "--model")
    parser.add_argument("-f", "--file", type=Path, required=True)
    parser.add_argument("-c", "--ctx-size", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--skip", type=int, default=0, help="windows passed over")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="JSON of what is printed, with each flip's p")
    given = parser.parse_args()
    prepare_torch()
    reference = ReferencePasses(given.model, given.device)
    ids = reference.tokenizer.encode(given.file.read_bytes().decode()).tolist()
    degrees = len(DRAWS) + PRIOR
    of = {w.name: Seen() for w in (*RIGHT, *WRONG)}
    expected, positions, moves = 0.0, 0, []
    for window in range(given.skip, given.skip + given.windows):
        tokens = ids[window * given.ctx_size : (window + 1) * given.ctx_size]
        seen = walk_window(reference, tokens)
        positions += len(tokens)
        expected += seen.expected
        exact = reference.logits(tokens, EXACT, len(tokens))
        for way in (*RIGHT, *WRONG):
            logits = reference.logits(tokens, way, len(tokens))
            of[way.name].add(seen, logits, float(divergences(logits, exact).mean()))
            if way in RIGHT:
                moves.append(np.abs(seen.moves_of(logits)))
        print(f"window {window + 1} done", flush=True)
    print(
        f"{reference.name}: {given.windows} windows of {given.ctx_size}, {positions} positions,"
        f" {reference.device}"
    )
    print(f"flips that rounding makes, by the stated probabilities: {expected:.2f} a kernel")
    for name, what in of.items():
        print(f"{name}: {what.line()}")
    z = np.concatenate(moves)
    beyond_of = {}
    for share in (0.5, 0.1, 0.01, 1e-3, 1e-4):
        limit = stats.t.isf(share / 2, degrees)
        beyond_of[share] = float((z > limit).mean())
        print(
            f"moves of right kernels beyond the {share:g} quantile: {beyond_of[share]:.2g} ({len(z)} moves)"
        )
    tie = stats.t.isf(COMMON / 2, degrees)
    beyond = np.clip(z - tie, 0, None).mean() / z.mean()
    print(f"share of flips by rounding that would not be ties, from these moves: {beyond:.2g}")
    if given.out:
        record = {
            "commit": commit(),
            "environment": describe(str(reference.device)),
            "model": reference.name,
            "windows": [given.skip, given.skip + given.windows],
            "ctx_size": given.ctx_size,
            "positions": positions,
            "expected_flips_a_kernel": expected,
            "moves": len(z),
            "moves_beyond_quantile": beyond_of,
            "kernels": {name: what.to_json() for name, what in of.items()},
        }
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    reference.close()


if __name__ == "__main__":
    main()
