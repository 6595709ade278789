"""What budgets that were read off a kernel still see: its own results, and two faults planted in them.

    python benchmarks/identified_faults.py SPEC [--shape 96/8x128] [--n-kv 4096,8192] [--rows 8]
        [--device cuda] [--out FILE.json]

One key of all is left out, and one head is 0.1 % too large. Says for each family of inputs whether the bound
says anything, and which detectors object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from verify.identify.learning import learn
from verify.kernels.budget.bound import error_budget
from verify.kernels.call import Call, Result
from verify.kernels.exact import exact_attention
from verify.kernels.judging.detectors import findings, measure
from verify.kernels.judging.families import ALL_FAMILIES, InputSizes, draw
from verify.kernels.plans.shapes import shape_named
from verify.kernels.registry import build_kernel
from verify.machine.environment import prepare_torch

FAMILIES = ("gaussian", "flat", "one-sign", "needles", "peaked")


def without(call: Call, key: int) -> torch.Tensor:
    """The exact result without a key, float64."""
    rest = [i for i in range(call.shape.keys) if i != key]
    fewer = replace(call, k=call.k[:, rest], v=call.v[:, rest], kv_len=call.kv_len - 1)
    return exact_attention(fewer).out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec")
    parser.add_argument("--shape", default="96/8x128")
    parser.add_argument("--n-kv", default="4096,8192")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(arguments)
    prepare_torch()
    heads, kernel = shape_named(asked.shape).heads, build_kernel(asked.spec)
    lengths = [int(n) for n in asked.n_kv.split(",")]
    said = learn(kernel, [heads], lengths, path="decode", dtype=torch.float16, device=asked.device)
    print(*said, sep="\n", flush=True)
    found: list[dict[str, Any]] = []
    for n_kv in lengths:
        for family in FAMILIES:
            rows = InputSizes(n_kv=tuple(range(n_kv - asked.rows + 1, n_kv + 1)), heads=heads, edges=())
            call = draw(family, rows, 0, device=asked.device)
            arithmetic = kernel.arithmetic_of(call)
            budget = error_budget(call, arithmetic)
            result = kernel.run(call)
            off = result.out.clone()
            off[:, :, -1] *= 1.001
            dropped = result.out.double() + without(call, n_kv // 3) - budget.out
            one: dict[str, Any] = {
                "n_kv": n_kv,
                "family": family,
                "vacuous": float(budget.vacuous.double().mean()),
                "bound": float((budget.bound / budget.size).median()),
                "identified": arithmetic.identified,
            }
            for name, out in (("right", result.out), ("key dropped", dropped.float()), ("head off", off)):
                measured = measure(
                    call, Result(out, result.lse, result.launched), arithmetic,
                    distinct=ALL_FAMILIES[family].distinct, budget=budget, heads_alike=True,
                )  # fmt: skip
                one[name] = [f"{each.detector}: {each.said}" for each in findings(measured)
                             if each.detector != "lse"]  # fmt: skip
            found.append(one)
            print(json.dumps(one), flush=True)
    kernel.close()
    if asked.out is not None:
        asked.out.write_text(json.dumps({"said": said, "cells": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
