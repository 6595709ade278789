"""How long the evidence on a kernel takes: inputs, budgets, and a probe of every key.

    python benchmarks/evidence.py [--device cuda] [--n-kv 65536] [--out benchmarks/results/NAME-evidence.json]

One GPU's GLM-4.5-Air (96 query heads over 8 KV heads of 128) on a GPU, one of 8 GPUs' on a CPU. `verify diff`
prints where its own time went, and `run.json` has it by length (`seconds`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from commit import commit, write_result

from verify.kernels.budget.bound import error_budgets
from verify.kernels.heads import Heads
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.gates import plain_attention
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.probes import judge, one_hot
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel
from verify.machine.devices import chosen_device, default_device
from verify.machine.environment import describe, prepare_torch
from verify.machine.stages import StageClock

SPECS = ("flash", "flash:heads=split,kv=4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--n-kv", type=int, default=65_536)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    prepare_torch()
    device, n_kv = chosen_device(arguments.device), arguments.n_kv
    heads = 8 if device.type == "cuda" else 1
    sizes = InputSizes(
        n_kv=(n_kv, n_kv - 37), heads=Heads.grouped(kv=heads, ratio=12, k_size=128, v_size=128)
    )
    kernels = [build_kernel(spec) for spec in SPECS]
    # Compiling a kernel, and the first use of a library, are not what is measured.
    _measure(
        StageClock(device),
        kernels,
        InputSizes(n_kv=(256, 219), heads=Heads.grouped(kv=heads, ratio=12, k_size=128, v_size=128)),
    )
    clock = StageClock(device)
    failures = _measure(clock, kernels, sizes)
    found = {
        "commit": commit(),
        "n_kv": n_kv,
        "kv_heads": heads,
        "probe_failures": failures,
        "seconds": {name: by["all"] for name, by in clock.to_json().items()},
        "environment": describe(str(device)),
    }
    write_result(found, arguments.out)


def _measure(clock: StageClock, kernels: list[Kernel], sizes: InputSizes) -> list[str]:
    """Every stage once; what the probe found wrong."""
    n_kv = max(sizes.n_kv)
    for family in FAMILIES:
        with clock.stage(f"draw {family}", n_kv):
            call = draw(family, sizes, 0, device=clock.device)
    call = draw("gaussian", sizes, 0, device=clock.device)
    arithmetics = [kernel.arithmetic_of(call) for kernel in kernels]
    with clock.stage(f"budgets of {len(kernels)} kernels", n_kv):
        error_budgets(call, arithmetics)
    with clock.stage("plain attention", n_kv):
        plain_attention(call)
    del call
    with clock.stage("one-hot probe of every key: made", n_kv):
        probe = one_hot(sizes, device=clock.device)
    failures = []
    for kernel, arithmetic in zip(kernels, arithmetics, strict=True):
        with clock.stage(f"one-hot probe of every key: {kernel.spec}", n_kv):
            result = kernel.run(probe.call)
        with clock.stage("one-hot probe of every key: judged", n_kv):
            failures += [str(failure) for failure in judge(probe, result, arithmetic)]
    return failures


if __name__ == "__main__":
    with torch.inference_mode():
        main()
