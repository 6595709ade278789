"""`verify diff` on a kernel that states nothing, and on two faults planted in its results.

    python benchmarks/identified_faults.py SPEC [--shape 96/8x128] [--n-kv 4096,8192] [--rows 16]
        [--inputs gaussian,flat,one-sign,needles,peaked] [--baseline flash] [--device cuda] [--out FILE.json]

One key is left out of rows of 4,096 keys or more, and one head is 0.1 % too large. Each of the three is read
as a kernel of its own, and judged by what was read of it. Exit code 0 where both faults are `broken` at every
length that is 4,096 or more, and the kernel itself at none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from verify.diff.inputs import DiffSettings, all_inputs
from verify.diff.run import run_diff
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import AttentionPath, Call, Result, Shape
from verify.kernels.capabilities import Capabilities
from verify.kernels.exact import exact_attention
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel
from verify.machine.environment import prepare_torch
from verify.machine.stages import StageClock

FAMILIES = "gaussian,flat,one-sign,needles,peaked"
# Keys of the shortest row that loses one: a third of the way along it.
FEWEST_KEYS = 4096
TOO_LARGE = 1.001


def one_key_less(call: Call, result: Result) -> Result:
    """The result of a kernel that errs as this one does and never saw one key of each long row."""
    lost = call.shape.keys // 3
    rest = [i for i in range(call.shape.keys) if i != lost]
    sees = call.kv_len > lost
    fewer = replace(
        call, k=call.k[:, rest], v=call.v[:, rest], kv_len=call.kv_len - sees.to(call.kv_len.dtype)
    )
    effect = exact_attention(fewer).out - exact_attention(call).out
    long = (call.kv_len >= FEWEST_KEYS)[..., None, None]
    return replace(result, out=torch.where(long, result.out + effect, result.out).to(result.out.dtype))


def last_head_too_large(call: Call, result: Result) -> Result:
    """The result with its last query head multiplied by 1.001."""
    out = result.out.clone()
    out[:, :, -1] *= TOO_LARGE
    return replace(result, out=out)


FAULTS = {"": None, "key-dropped": one_key_less, "head-off": last_head_too_large}


class Planted(Kernel):
    """`inner`, whose results are spoiled; it says of itself what the inner one does."""

    def __init__(self, spec: str, inner: Kernel, fault: str) -> None:
        super().__init__(spec)
        self.inner, self.spoil = inner, FAULTS[fault]

    def run(self, call: Call) -> Result:
        result = self.inner.run(call)
        return result if self.spoil is None else self.spoil(call, result)

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return self.inner.arithmetic(shape, path)

    def arithmetic_of(self, call: Call) -> Arithmetic:
        return self.identified_of(call) or self.inner.arithmetic_of(call)

    def capabilities(self) -> Capabilities:
        return self.inner.capabilities()

    def forgive(self) -> None:
        self.inner.forgive()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec")
    parser.add_argument("--shape", default="96/8x128")
    parser.add_argument("--n-kv", default="4096,8192")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--inputs", default=FAMILIES)
    parser.add_argument("--baseline", default="flash")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    prepare_torch()
    inner, device = build_kernel(asked.spec), torch.device(asked.device)
    specs = {f"{asked.spec},planted={name}" if name else asked.spec: name for name in FAULTS}
    found: dict[str, Any] = {"spec": asked.spec, "shape": asked.shape, "rows": asked.rows, "verdicts": {}}
    as_due = True
    # A length at a time: what is long ends with what was found of the shorter.
    for n_kv in map(int, asked.n_kv.split(",")):
        built: dict[str, Kernel] = {spec: Planted(spec, inner, name) for spec, name in specs.items()}

        def build(spec: str, built: dict[str, Kernel] = built) -> Kernel:
            if spec not in built:
                built[spec] = build_kernel(spec)
            return built[spec]

        settings = DiffSettings(
            shapes=(asked.shape,),
            n_kvs=(n_kv,),
            families=tuple(asked.inputs.split(",")),
            baseline=asked.baseline,
            candidates=tuple(specs),
            device=asked.device,
            rows=asked.rows,
            most_rows=asked.rows,
        )
        began, clock = time.monotonic(), StageClock(device)
        inputs = all_inputs(settings, device, clock)
        outcome = run_diff(settings, device, inputs, clock, build=build, name_bugs=False)
        cells: dict[str, Any] = {"seconds": time.monotonic() - began, "stages": outcome.seconds}
        cells["notes"] = outcome.notes
        for one in outcome.candidates:
            name = specs[one.spec] or "as it is"
            broken = {cell.inputs.family: cell.faults[0] for cell in one.cells if cell.faults}
            cells[name] = {"verdict": one.verdict, "reasons": one.reasons, "faults": broken}
            due = bool(specs[one.spec]) and n_kv >= FEWEST_KEYS
            as_due &= (one.verdict == "broken") == due
            print(f"{n_kv} keys, {name}: {one.verdict}: {'; '.join(one.reasons)}", flush=True)
            for family, fault in broken.items():
                print(f"    {family}: {fault}", flush=True)
        print(*outcome.notes, f"{cells['seconds']:.0f} s: {outcome.seconds}", sep="\n", flush=True)
        found["verdicts"][str(n_kv)] = cells
        if asked.out is not None:
            asked.out.write_text(json.dumps(found, indent=1) + "\n")
    inner.close()
    return 0 if as_due else 1


if __name__ == "__main__":
    sys.exit(main())
