"""The kernel's own error, in place: every layer, on the exact arm's q, k, v of the real text.

An arm that runs freely drifts from exact for many reasons; here each kernel gets the same inputs as the
oracle and answers for its own rounding alone. Some rows of every window are sampled: the first two, the
last, and others drawn by seed; windows that are computed side by side share them. Of very many windows some
are checked, evenly spread. An error above its budget is a bug, whatever the perplexity says.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from kernels.arithmetic import Arithmetic
from kernels.budget import Budget, budget_ratio, error_budgets
from kernels.contract import Call, checked_call
from kernels.detectors import LARGEST_RELATIVE_ERROR
from model.runner import LayerCall
from verify.arms import Arm, Place, kernel_call
from verify.attempt import attempt

SAMPLED_ROWS = 8
CHECKED_WINDOWS = 64


class HeadErrors(NamedTuple):
    """One row of layers.parquet: a kernel at one layer, window and head, over the sampled rows.

    relative_rms: ||error|| / ||exact||; gain: <error, exact> / <exact, exact>, a scale error;
    max_budget_ratio: largest |error| / budget where the budget is not vacuous; relative_max: largest
    ||error|| / ||sum p|v||| of a row; vacuous: share of rows with a vacuous budget; position: of the worst
    row.
    """

    window: int
    layer: int
    arm: str
    path: str
    head: int
    relative_rms: float
    gain: float
    max_budget_ratio: float
    relative_max: float
    vacuous: float
    nonfinite: int
    position: int


def sampled_rows(n_ctx: int, *, seed: int, slab: int, layer: int) -> torch.Tensor:
    """Positions that are checked, ascending: 0, 1, the last and others drawn by seed, slab and layer.

    slab: number of the windows that are computed together; on a CPU, the window's.
    """
    fixed = {0, min(1, n_ctx - 1), n_ctx - 1}
    key = zlib.crc32(f"rows/{seed}/{slab}/{layer}".encode())
    drawn = torch.randperm(n_ctx, generator=torch.Generator().manual_seed(key)).tolist()
    more = [row for row in drawn if row not in fixed][: max(SAMPLED_ROWS - len(fixed), 0)]
    return torch.tensor(sorted(fixed | set(more)))


class InPlace:
    """Checks the kernels of some arms whenever the exact arm attends.

    windows_at_once: how many windows a device computes together; windows: of the whole run. Where there are
    more than CHECKED_WINDOWS, so many are checked, evenly spread.
    """

    def __init__(
        self, arms: Sequence[Arm], *, seed: int = 0, windows_at_once: int = 1, windows: int = 1
    ) -> None:
        self.arms = [arm for arm in arms if arm.kernel is not None and arm.role != "control"]
        self.seed, self.windows_at_once = seed, windows_at_once
        slabs = -(-windows // windows_at_once)
        self.every = -(-slabs // max(CHECKED_WINDOWS // windows_at_once, 1))
        self.rows: list[HeadErrors] = []

    def __call__(self, call: LayerCall) -> None:
        """Check every kernel on this layer's exact inputs."""
        slab = call.window // self.windows_at_once
        if slab % self.every:
            return
        rows = sampled_rows(call.q.shape[1], seed=self.seed, slab=slab, layer=call.layer)
        rows = rows.to(call.q.device)
        done: list[tuple[Arm, torch.Tensor, Arithmetic]] = []
        for arm in self.arms:
            if arm.failed or arm.kernel is None:
                continue
            small = kernel_call(call, arm.path, rows)
            tried = attempt(arm.kernel, small)
            if tried.output is None:
                arm.findings.failure = tried.failure
                arm.findings.failure_place = Place(call.window, call.layer)
                continue
            out = tried.output.out.transpose(0, 1).flatten(1, 2)
            done.append((arm, out, arm.kernel.arithmetic(small.shape, arm.path)))
        if done:
            # What follows from the inputs alone is computed once for all kernels.
            budgets = error_budgets(_as_one_sequence(small), [arithmetic for _, _, arithmetic in done])
            for (arm, out, _), budget in zip(done, budgets, strict=True):
                self.rows += _by_head(call, arm, rows, out, budget)


def _by_head(
    call: LayerCall, arm: Arm, rows: torch.Tensor, out: torch.Tensor, budget: Budget
) -> list[HeadErrors]:
    """out [rows, B * H, Dv], as the budget of `_as_one_sequence` has it."""
    exact, bound = budget.out[0], budget.bound[0]  # [rows, B * H, Dv]
    error = out.double() - exact
    bad = ~torch.isfinite(error).all(-1)  # [rows, B * H]
    error = torch.where(bad[..., None], 0.0, error)
    ratio = budget_ratio(error, bound).amax(-1)
    vacuous = budget.vacuous[0]
    ratio = torch.where(vacuous, 0.0, ratio)
    relative = error.norm(dim=-1) / budget.size[0].norm(dim=-1).clamp(min=1e-300)
    power = exact.square().sum((0, 2)).clamp(min=1e-300)
    rms = (error.square().sum((0, 2)) / power).sqrt()
    gain = (error * exact).sum((0, 2)) / power
    worst = torch.where(vacuous, relative / LARGEST_RELATIVE_ERROR, ratio) + bad * 1e9
    at = rows[worst.argmax(0)]
    columns: list[list[Any]] = [
        x.tolist()
        for x in (
            rms,
            gain,
            ratio.amax(0),
            torch.where(vacuous, relative, 0.0).amax(0),
            vacuous.double().mean(0),
            bad.sum(0),
            at,
        )
    ]
    heads = call.q.shape[2]
    return [
        HeadErrors(call.window + i // heads, call.layer, arm.name, arm.path, i % heads, *values)
        for i, values in enumerate(zip(*columns, strict=True))
    ]


def _as_one_sequence(call: Call) -> Call:
    """Sequences of equal lengths as further KV heads of one: [B, T, H, D] becomes [1, T, B * H, D]."""
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (call.q, call.k, call.v))
    return checked_call(
        q,
        k,
        v,
        kv_len=call.kv_len[:1],
        scale=call.scale,
        path=call.path,
        sliding_window=call.sliding_window,
        softcap=call.softcap,
    )


def fault_of(errors: HeadErrors) -> str | None:
    """The sentence that makes an arm `broken`, or None."""
    where = Place(errors.window, errors.layer, errors.position, errors.head)
    return fault_sentence(str(where), errors.nonfinite, errors.max_budget_ratio, errors.relative_max)


def fault_sentence(where: str, nonfinite: int, budget_ratio: float, relative_max: float) -> str | None:
    """What is wrong with a kernel's error, or None. relative_max: where the budget is vacuous."""
    if nonfinite:
        return f"NaN or Inf at {where}"
    if budget_ratio > 1:
        return f"error is {budget_ratio:.3g} times its rounding budget at {where}"
    if relative_max > LARGEST_RELATIVE_ERROR:
        return f"error is {relative_max:.1%} of sum p|v| at {where}, where no correct kernel exceeds 1/8"
    return None
