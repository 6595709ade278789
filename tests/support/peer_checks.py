"""What every kernel of another library must do, on a CPU or a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from verify.kernels.budget.bound import error_budget
from verify.kernels.call import AttentionOutput
from verify.kernels.heads import Heads
from verify.kernels.judging.detectors import findings, measure
from verify.kernels.judging.families import FAMILIES, draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel

# Options that a family's inputs carry, and the capability that they need.
NEEDS = {"window": "sliding_window", "softcap": "softcap", "alibi": "alibi"}


def agrees_with_exact(spec: str, device: torch.device, *, n_kv: tuple[int, ...] = (300, 257, 64)) -> Kernel:
    """Within its budget on every path and option that it has, with the rows that it says it ran.

    GLM's ratio and head size, two KV heads. All rows of a path see as many keys in one shape, so that what
    compiles does it once an option.
    """
    kernel = build_kernel(spec)
    has = kernel.capabilities()
    sizes = InputSizes(n_kv=n_kv, heads=Heads.grouped(kv=2, ratio=12, k_size=128, v_size=128))
    families = ["gaussian", "needles", *(name for name, needed in NEEDS.items() if getattr(has, needed))]
    for path in has.paths:
        for family in families if path == "decode" else families[:1]:
            _holds(kernel, family, replace(sizes, path=path), device)  # type: ignore[arg-type]
    return kernel


def _holds(kernel: Kernel, family: str, sizes: InputSizes, device: torch.device) -> None:
    call = draw(family, sizes, 0, device=device)
    result = kernel.run(call)
    assert sum(result.launched.rows.values()) == len(sizes.n_kv)
    arithmetic = kernel.arithmetic_of(call)
    budget = error_budget(call, arithmetic)
    if not kernel.capabilities().lse:
        assert bool(result.lse.isnan().all())
        result = AttentionOutput(result.out, budget.lse)
    found = measure(call, result, arithmetic, distinct=FAMILIES[family].distinct, budget=budget)
    said = [f for f in findings(found) if f.detector != "quadrature"]
    assert said == [], f"{kernel.spec}, {family}, {call.path}: {said}"
    # The budget of an unknown plan is loose; half-precision results are not.
    error = float((result.out.double() - budget.out).norm() / budget.out.norm())
    assert error < 2e-3, f"{kernel.spec}, {family}, {call.path}: relative error {error:.2e}"
