"""A stated arithmetic with float16 sums, step by step: what of an error is the limit of such sums.

The worst-case bound of float16 accumulators says nothing (`vacuous`): beyond 65,504 they overflow, and where
a step is less than half of what numbers lie apart they stagnate. On inputs that were drawn to do that, a
kernel which says that it sums so is not wrong; it is coarse. The same sums, emulated on the same q, k and v,
tell.
"""

from __future__ import annotations

import math

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import Call, Shape
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.plans.plan import RowPlan

# Errors of the same origin are of the same size, within this factor.
ALIKE_WITHIN = 2.0


class EmulatedSums(TileKernel):
    """The tile kernel with another's cuts, tiles and types."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__(
            "emulated", block=arithmetic.block or 64, p=arithmetic.p, out=arithmetic.out, acc="f16"
        )
        self.of = arithmetic

    def planned(self, shape: Shape, n: int) -> RowPlan:
        plan = super().planned(shape, n)
        return plan if self.of.cuts_at is None else plan._replace(cuts=self.of.cuts_at(n))


def limit_of_float16_sums(
    call: Call, out: torch.Tensor, exact: torch.Tensor, arithmetic: Arithmetic
) -> str | None:
    """What a result is off by for the limits of float16 sums alone, in words, or None.

    out, exact [B, T, Hq, Dv]; the arithmetic must be stated: one that is assumed excuses nothing. So is it
    where the emulation is not finite in the same elements, and errs as much in the others, within a factor
    of 2.
    """
    if not arithmetic.stated or arithmetic.acc != "f16" or arithmetic.cuts_at is None:
        return None
    emulated = EmulatedSums(arithmetic).run(call).out
    bad, due = ~torch.isfinite(out), ~torch.isfinite(emulated)
    if not torch.equal(bad, due):
        return None
    error, expected = (float(torch.where(bad, 0.0, x.double() - exact).norm()) for x in (out, emulated))
    if not expected / ALIKE_WITHIN <= error <= expected * ALIKE_WITHIN:
        return None
    if bool(bad.any()):
        return f"limit of float16 sums: {int(bad.sum())} elements overflow, as they do when emulated"
    share = error / max(float(exact.norm()), math.ulp(0.0))
    return f"limit of float16 sums: they stagnate, {share:.1%} of the result, as they do when emulated"
