"""The kernels' own error while text is generated: on the exact arm's q, k and v, at every step.

Each step checks some of the layers, the next step others, so that all of them are checked again and again at
a small part of the cost. An error beyond its budget is a bug; the ratio of two kernels' errors is what the
verdict rests on where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_type_hints

import pyarrow as pa
import torch

from verify.arms.alone import CALLS, is_asked
from verify.arms.arm import ArmRunner, common_cache, kernel_call
from verify.arms.attempt import attempt
from verify.arms.own_error import worst_rows
from verify.kernels.budget.bound import error_budget
from verify.kernels.exact import exact_attention
from verify.kernels.judging.figures import (
    budget_fault,
    gain_of,
    pooled_gain,
    pooled_rms,
    row_figures,
)
from verify.model.layer_call import LayerCall

LAYERS_A_STEP = 4
PROMPT_ROWS = 8
_SMALLEST_SQUARE = 1e-300


class StepCheck(NamedTuple):
    """One row of layers.parquet: a kernel at one step and layer, over all heads (and rows of the prompt).

    All but square_error is of the error on what the kernel's own cache holds: what a cache loses is distance,
    not a fault.
    """

    step: int  # -1 is the prompt
    layer: int  # counted from 0
    arm: str  # its name
    square_error: float  # squared distance to exact on the inputs as given, over the square of that
    max_budget_ratio: float  # largest |error| / budget where the budget is not vacuous
    relative_max: float  # largest ||error|| / ||sum p|v||| of a head where it is
    vacuous: float  # share of such heads
    nonfinite: int  # heads with NaN or Inf
    n_kv: int  # of the worst
    head: int  # of the worst
    relative_rms: float = math.nan  # this and the next as in `verify.arms.own_error.HeadErrors`
    rms_ratio: float = math.nan  # error over its expected size
    gain: float = math.nan  # a common factor is 1 + gain
    # What roundings that go one way may make of the gain, as the kernel states its arithmetic.
    gain_bias: float = math.nan
    # How far down they may take it where the arithmetic is only assumed.
    gain_falls: float = math.nan
    # The same up.
    gain_rises: float = math.nan
    # Number of the call that the step was part of, counted from 0: with drafts a call has several steps.
    call: int = -1

    @property
    def fault(self) -> str | None:
        """The sentence that makes the arm `broken`, or None."""
        at = "the prompt" if self.step < 0 else f"token {self.step + 1}"
        where = f" at {at}, layer {self.layer}, n_kv {self.n_kv}, head {self.head}"
        return budget_fault(self.nonfinite, self.max_budget_ratio, self.relative_max, where)


_ARROW = {int: pa.int32(), float: pa.float64(), str: pa.string()}
CHECK_SCHEMA = pa.schema([(name, _ARROW[kind]) for name, kind in get_type_hints(StepCheck).items()])


class CheckedExact:
    """The exact arm, as the stepper sees it: whenever it attends, the kernels are checked on its inputs.

    layers: of the model; calls: that will be made for the text.
    """

    def __init__(self, exact: ArmRunner, runners: Iterable[ArmRunner], layers: int, calls: int) -> None:
        self.exact, self.name = exact, exact.name
        self.kernels = [one for one in runners if one.arm.kernel is not None and one.arm.role != "control"]
        each = LAYERS_A_STEP
        if any(is_asked(one.arm) for one in self.kernels):
            # The calls of one query token that such a kernel gets are those of the text.
            each = max(each, -(-CALLS * layers // calls))
        self.stride = max(layers // each, 1)
        # The first step of the call at hand, and its number; -1: the prompt.
        self.step = self.number = -1
        self.common_cache = common_cache(one.arm for one in self.kernels)
        self.checks: list[StepCheck] = []
        # Results of the call at hand, by arm.
        self._outs: dict[str, torch.Tensor] = {}

    def attend(self, call: LayerCall) -> torch.Tensor | None:
        out = self.exact.attend(call)
        if (call.layer - self.number) % self.stride == 0:
            self._outs.clear()
            oracle = exact_attention(kernel_call(call, self.exact.path), with_lse=False).out[0]
            for one in self.kernels:
                self._check(call, one, oracle)
        return out

    def _check(self, call: LayerCall, one: ArmRunner, oracle: torch.Tensor) -> None:
        """One kernel on all rows of a layer; of the prompt budgets of some, and of those that err most.

        oracle [T, H, Dv]: float64 attention on keys and values as they were given.
        """
        kernel = one.arm.kernel
        if one.failed or kernel is None:
            return
        whole = kernel_call(call, one.path)
        tried = attempt(kernel, whole)
        if tried.output is None:
            one.fail(tried.failure, call)
            return
        got = tried.output.out[0].double()  # [T, H, Dv]
        self._outs[one.name] = tried.output.out
        if one.arm.reference is not None:
            one.check_beyond(call, tried.output.out, self._outs.get(one.arm.reference))
        distance = got - oracle
        bad = ~torch.isfinite(distance).all(-1)
        distance = torch.where(bad[..., None], 0.0, distance)
        in_text = self.step >= 0
        rows = torch.arange(len(got), device=got.device) if in_text else _rows_to_check(distance, oracle, bad)
        small = kernel_call(call, one.path, rows)
        budget = error_budget(kernel.held(small), kernel.arithmetic_of(small))
        exact = budget.out
        figures = row_figures(got[rows] - exact, budget)
        error = torch.where(bad[rows][..., None], 0.0, got[rows] - exact[0])[None]
        every = (0, 1, 2)
        # Each row of the text is a step, those of the prompt are one together.
        steps = [(i, slice(i, i + 1)) for i in range(len(rows))] if in_text else [(0, slice(None))]
        for i, at in steps:
            figure = figures.of_rows(at)
            worst, head = divmod(int(figure.severity.argmax()), error.shape[2])
            if self.common_cache:
                square, power = error[:, at].square().sum(), exact[:, at].square().sum()
            else:
                square, power = distance[at].square().sum(), oracle[at].square().sum()
            gain, aim = gain_of(error[:, at], exact[:, at], (*every, 3))
            relative = error[:, at].square().sum() / aim.clamp(min=_SMALLEST_SQUARE)
            self.checks.append(
                StepCheck(
                    step=self.step + i,
                    layer=call.layer,
                    arm=one.name,
                    square_error=float(square / power.clamp(min=_SMALLEST_SQUARE)),
                    max_budget_ratio=float(figure.ratio.max()),
                    relative_max=float(figure.relative.max()),
                    vacuous=float(figure.vacuous.double().mean()),
                    nonfinite=int(bad[at].sum()),
                    n_kv=int(small.kv_len[0, i + worst]),
                    head=head,
                    relative_rms=float(relative.sqrt()),
                    rms_ratio=float(pooled_rms(figure.rms, every)),
                    gain=float(gain),
                    gain_bias=float(pooled_gain(figure.bias, figure.power, every)),
                    gain_falls=float(pooled_gain(figure.falls, figure.power, every)),
                    gain_rises=float(pooled_gain(figure.rises, figure.power, every)),
                    call=self.number,
                )
            )

    def table(self) -> pa.Table:
        """All checks, as layers.parquet holds them."""
        columns = list(zip(*self.checks, strict=True)) or [()] * len(CHECK_SCHEMA)
        arrays = [pa.array(c, f.type) for c, f in zip(columns, CHECK_SCHEMA, strict=True)]
        return pa.Table.from_arrays(arrays, schema=CHECK_SCHEMA)


def _rows_to_check(distance: torch.Tensor, oracle: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    """Rows [n], ascending: some spread over the call, those that err most, and the first with NaN or Inf."""
    count = distance.shape[0]
    if count == 1:
        return torch.zeros(1, dtype=torch.long, device=distance.device)
    worst, first_bad = worst_rows(distance[None], oracle[None]), bad.any(-1).long().argmax()[None]
    spread = torch.linspace(0, count - 1, min(count, PROMPT_ROWS), device=distance.device).long()
    return torch.cat((spread, worst, first_bad)).unique()


def log_squares(
    checks: Sequence[StepCheck], candidate: str, reference: str, *, text_alone: bool = False
) -> list[float]:
    """ln(square error of the candidate / of the reference) of each call, the mean over its layers and steps:
    the rows of a call share its layers, so that only calls are independent. text_alone: without the prompt,
    which no draft is in."""
    asked = [c for c in checks if c.step >= 0 or not text_alone]
    errors = {(c.call, c.step, c.layer, c.arm): max(c.square_error, _SMALLEST_SQUARE) for c in asked}
    by_call: dict[int, list[float]] = {}
    for (call, step, layer, arm), square in errors.items():
        other = errors.get((call, step, layer, reference))
        if arm == candidate and other is not None:
            by_call.setdefault(call, []).append(math.log(square / other))
    return [sum(values) / len(values) for values in by_call.values()]
