"""A stated arithmetic with float16 sums, step by step: what of an error is the limit of such sums.

The worst-case bound of float16 accumulators says nothing (`vacuous`): beyond 65,504 they overflow, and where
a step is less than half of what numbers lie apart they stagnate. On inputs that were drawn to do that, a
kernel which says that it sums so is not wrong; it is coarse. The same sums, emulated on the same q, k and v,
tell.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import Call, Shape
from verify.kernels.faults.tile_kernel import TileKernel, TileRow, accumulate_f16
from verify.kernels.judging.figures import LARGEST_RELATIVE_ERROR
from verify.kernels.judging.headroom import F16_LARGEST
from verify.kernels.numbers import MMA_KEYS
from verify.kernels.plans.plan import RowPlan
from verify.kernels.sequences import sequences

# Errors of the same origin are of the same size, within this factor.
ALIKE_WITHIN = 2.0
# By how much, relative, float16 sums of some hundred steps may differ for the order in which each adds.
NEAR = 2.0**-7


class EmulatedSums(TileKernel):
    """The tile kernel with another's cuts, tiles and their order, offset on the maximum and types.

    step: keys that are summed before the sum is rounded; stretch: what values are multiplied by.
    """

    def __init__(self, arithmetic: Arithmetic, step: int, stretch: float = 1.0) -> None:
        super().__init__(
            "emulated", block=arithmetic.block or 64, p=arithmetic.p, out=arithmetic.out, acc="f16"
        )
        self.of, self.step, self.stretch = arithmetic, step, stretch
        self.offset = arithmetic.p_shift
        self.newest_first = arithmetic.tile_order == "backward"

    def planned(self, shape: Shape, n: int) -> RowPlan:
        plan = super().planned(shape, n)
        return plan if self.of.cuts_at is None else plan._replace(cuts=self.of.cuts_at(n))

    def tiles(self, start: int, stop: int) -> list[tuple[int, int]]:
        tiles = super().tiles(start, stop)
        return tiles[::-1] if self.newest_first else tiles

    def values(self, row: TileRow, first: int, last: int) -> torch.Tensor:
        return super().values(row, first, last) * self.stretch

    def accumulate(self, a: torch.Tensor, p: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return accumulate_f16(a, p, v, self.step)


def limit_of_float16_sums(
    call: Call, out: torch.Tensor, exact: torch.Tensor, arithmetic: Arithmetic
) -> str | None:
    """What a result is off by for the limits of float16 sums alone, in words, or None.

    out, exact [B, T, Hq, Dv]; the arithmetic must be stated or read off the kernel: one that is assumed
    excuses nothing. Nor does one whose emulation is finite in other elements, or errs otherwise in those that
    both have, by more than a factor of 2. Elements whose sums come as near to the overflow as their own
    roundings reach (`NEAR`) may be finite in one and not in the other. Where what was read does not say which
    keys are summed together, or in which order, elements may overflow that do so in some order, and sums
    stagnate as so many do.
    """
    if not arithmetic.stated or arithmetic.acc != "f16":
        return None
    if arithmetic.identified and not _has_places(arithmetic, call):
        if bool(torch.isfinite(out).all()):
            return _stagnating_in_so_many(call, out, exact, arithmetic)
        return _in_some_order(call, out, exact, arithmetic)
    if arithmetic.cuts_at is None:
        return None
    said = _explained_by_any(call, out, exact, arithmetic)
    if said is None and arithmetic.identified and arithmetic.tile_order is None:
        # Tiles may be walked in orders that are no walk from one end to the other.
        said = _in_some_order(call, out, exact, arithmetic)
    return said


def _has_places(arithmetic: Arithmetic, call: Call) -> bool:
    """Whether all keys of a row are in one sum, tile after tile: of several only the number is read."""
    longest = int(call.kv_len.max()) if call.kv_len.numel() else 0
    cuts_at = arithmetic.cuts_at
    return cuts_at is not None and arithmetic.sum_share == 1 and len(cuts_at(longest)) <= 2


def _in_some_order(call: Call, out: torch.Tensor, exact: torch.Tensor, arithmetic: Arithmetic) -> str | None:
    """Whether all that is not finite overflows in some order of its keys, each at its own maximum, and the
    rest is right but for rounding."""
    bad = ~torch.isfinite(out)
    error, size = (float(torch.where(bad, 0.0, x).norm()) for x in (out.double() - exact, exact))
    if not bool(bad.any()) or error > LARGEST_RELATIVE_ERROR * size:
        return None
    least = F16_LARGEST * math.exp(arithmetic.p_shift) * (1 - NEAR)
    for sequence in sequences(call):
        b, rows = sequence.at
        sums = torch.nn.functional.pad(sequence.v.double().abs().cumsum(0), (0, 0, 0, 0, 1, 0))
        most = sums[sequence.kv_len.long()].repeat_interleave(call.shape.ratio, 1)  # [T, Hq, Dv]
        if bool((bad[b, rows] & (most < least)).any()):
            return None
    return f"limit of float16 sums: {int(bad.sum())} elements overflow, as sums of such values may"


def _stagnating_in_so_many(
    call: Call, out: torch.Tensor, exact: torch.Tensor, arithmetic: Arithmetic
) -> str | None:
    """The same of results that are finite, where of several sums only the number is known: how far each
    stagnates follows from how many keys it takes, and hardly from which. Sums of equal runs of keys stand for
    them."""
    if arithmetic.cuts_at is None:
        return None
    cuts_at, share = arithmetic.cuts_at, arithmetic.sum_share

    def equal(n: int) -> tuple[int, ...]:
        sums = max(round((len(cuts_at(n)) - 1) / share), 1)
        return tuple(dict.fromkeys(n * i // sums for i in range(sums + 1)))

    return _explained_by_any(call, out, exact, replace(arithmetic, cuts_at=equal, sum_share=1.0))


def _explained_by_any(
    call: Call, out: torch.Tensor, exact: torch.Tensor, arithmetic: Arithmetic
) -> str | None:
    """What explains a result of all that its arithmetic leaves open."""
    for order in arithmetic.tile_orders:
        for step in _steps_of(arithmetic):
            walked = replace(arithmetic, tile_order=order)
            if (said := _explained(call, out, exact, walked, step)) is not None:
                return said
    return None


def _steps_of(arithmetic: Arithmetic) -> list[int]:
    """Keys that may be summed before a sum is rounded: what is read as 1 may be what could not be told."""
    known = [arithmetic.sum_step]
    if arithmetic.identified and arithmetic.block is not None:
        known += [MMA_KEYS, arithmetic.block]
    return list(dict.fromkeys(known))


def _explained(
    call: Call, out: torch.Tensor, exact: torch.Tensor, arithmetic: Arithmetic, step: int
) -> str | None:
    """The same for sums that are rounded every so many keys."""
    emulated = EmulatedSums(arithmetic, step).run(call).out
    bad, due = ~torch.isfinite(out), ~torch.isfinite(emulated)
    if not torch.equal(bad, due):
        surely, possibly = (
            ~torch.isfinite(EmulatedSums(arithmetic, step, 1 + by).run(call).out) for by in (-NEAR, NEAR)
        )
        if bool((surely & ~bad).any()) or bool((bad & ~possibly).any()):
            return None
    both = bad | due
    error, expected = (float(torch.where(both, 0.0, x.double() - exact).norm()) for x in (out, emulated))
    if not expected / ALIKE_WITHIN <= error <= expected * ALIKE_WITHIN:
        return None
    if bool(bad.any()):
        return f"limit of float16 sums: {int(bad.sum())} elements overflow, as they do when emulated"
    share = error / max(float(exact.norm()), math.ulp(0.0))
    return f"limit of float16 sums: they stagnate, {share:.1%} of the result, as they do when emulated"
