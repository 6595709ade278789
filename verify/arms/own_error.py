"""The kernel's own error, in place: every layer, on the exact arm's q, k, v of the real text.

An arm that runs freely drifts from exact for many reasons; here each kernel gets the same inputs as the
oracle and answers for its own rounding alone. All rows count for the size of the error and for its gain; the
budget is derived for some rows: the first two, the last, others drawn by seed, and the two that err most;
windows that are computed side by side share them. Of a long text a sample of windows is measured
(`verify.arms.sample`). An error above its budget is a bug, whatever the perplexity says.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from verify.arms.arm import Arm, Place
from verify.arms.sample import Sample
from verify.kernels.bits import not_finite
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.budget.bound import Budget, error_budgets
from verify.kernels.call import Call
from verify.kernels.judging.figures import (
    SMALLEST_SQUARE,
    budget_fault,
    lse_fault,
    lse_ratio,
    pooled_gain,
    pooled_rms,
    relative_rms,
    row_figures,
)
from verify.kernels.lengths import RowLengths, known_lengths, lengths_of
from verify.kernels.transfers import Download, uploaded
from verify.model.layer_call import LayerCall

SAMPLED_ROWS = 8
# Of a long text, each layer's budgets are derived in this many windows at most, other ones in each layer.
CHECKED_WINDOWS = 64


class HeadErrors(NamedTuple):
    """One row of layers.parquet: a kernel at one layer, window and head.

    Figures of sampled rows are NaN where the window was not sampled.
    """

    window: int  # counted from 0
    layer: int  # counted from 0
    arm: str  # its name, or that of a planted fault
    path: str  # decode, several or prefill
    head: int  # query head
    relative_rms: float  # over all rows: ||error|| / ||exact||
    gain: float  # over all rows: <error, exact> / <exact, exact>, a scale error
    # Over the sampled rows and those that err most: largest |error| / budget where it says something.
    max_budget_ratio: float
    rms_ratio: float  # over the sampled rows: root mean square of error / expected size
    # As max_budget_ratio: largest ||error|| / ||sum p|v||| of a row where the budget is vacuous.
    relative_max: float
    vacuous: float  # over the sampled rows: share of those with such a budget
    # What roundings that go one way may make of the gain, as the kernel states its arithmetic.
    gain_bias: float
    # How far down they may take it where the arithmetic is only assumed.
    gain_falls: float
    # The same up.
    gain_rises: float
    nonfinite: int  # over all rows: those with NaN or Inf
    position: int  # of the worst row
    # Over all rows: ||exact on what its cache holds - exact|| / ||exact||, what the cache alone loses.
    cache_rms: float = 0.0
    # Over the rows that have a budget: largest |lse error| / bound; NaN where the kernel returns no lse.
    lse_budget_ratio: float = math.nan
    lse_position: float = math.nan  # of the row of that


_FIGURES = HeadErrors._fields[5:]
_ARROW = {"arm": pa.string(), "path": pa.string()} | {
    name: pa.int32() for name in ("window", "layer", "head", "nonfinite", "position")
}
LAYER_SCHEMA = pa.schema([(name, _ARROW.get(name, pa.float64())) for name in HeadErrors._fields])


def sampled_rows(n_ctx: int, *, seed: int, slab: int, layer: int) -> list[int]:
    """Rows that are checked, ascending: 0, 1, the last and others drawn by seed, slab and layer.

    slab: number of the windows that are computed together; on a CPU, the window's.
    """
    fixed = {0, min(1, n_ctx - 1), n_ctx - 1}
    key = zlib.crc32(f"rows/{seed}/{slab}/{layer}".encode())
    # Of the first so many there are enough that are not fixed.
    drawn = torch.randperm(n_ctx, generator=torch.Generator().manual_seed(key))[:SAMPLED_ROWS].tolist()
    more = [row for row in drawn if row not in fixed][: max(SAMPLED_ROWS - len(fixed), 0)]
    return sorted(fixed | set(more))


class Measured(NamedTuple):
    """One kernel's errors at one layer; tensors [B, T, H, Dv]."""

    arm: Arm  # whose kernel it is
    own: Call  # on what its own cache holds
    alone: bool  # whether that is not what the others have
    exact: torch.Tensor  # float64 attention of `own`
    given: torch.Tensor  # the same of keys and values as they were given
    errors: Mapping[str, torch.Tensor]  # the kernel's, and with faults planted, by the name they go under
    lse: torch.Tensor | None = None  # the kernel's [B, T, H]; None: it returns none


class _DueLayer(NamedTuple):
    """The rows of one layer that have a budget, as far as the device knows them; the host asks it later."""

    window: int  # the first of the call
    layer: int  # of the call
    chosen: Download  # of rows of the call: the sampled ones, then those that err most
    sampled: int  # how many were sampled
    lengths: RowLengths  # visible keys of every row of the call
    calls: list[_BudgetCall]  # those rows of every call that a kernel has
    errors: list[_DueErrors]  # in the order in which they are entered


class _BudgetCall(NamedTuple):
    """Rows of a call as one sequence, and the kernels that had it."""

    rows: Call
    arithmetics: dict[str, Arithmetic]  # by arm


class _DueErrors(NamedTuple):
    """One kernel's errors at those rows, and its figures of all rows."""

    name: str  # of the arm, or of a planted fault
    arm: str  # whose kernel it is
    path: str  # decode, several or prefill
    error: torch.Tensor  # [1, rows, B * H, Dv]
    figures: dict[str, torch.Tensor]  # of all rows, [B, H]
    lse: torch.Tensor | None  # [1, rows, B * H]; None: nothing is to be said of it


class InPlace:
    """Collects what kernels err on the exact arm's inputs.

    sample: the windows that are measured; at_once: how many a device computes together. Figures stay on the
    device until `table` asks for them. Which rows err most the host must know to make their budgets: it makes
    those of a layer when the next one comes, so that it finds the answer there and the device has work
    meanwhile.
    """

    def __init__(self, sample: Sample, *, seed: int = 0, at_once: int = 1) -> None:
        self.seed, self.at_once, self.sample = seed, at_once, sample
        self.stride = -(-sample.runs // max(CHECKED_WINDOWS // at_once, 1))
        # First window, layer, name and path of each check, and its figures [figures, windows, heads].
        self._checks: list[tuple[int, int, str, str]] = []
        self._figures: list[torch.Tensor] = []
        self._due: _DueLayer | None = None

    def __call__(self, call: LayerCall, measured: Sequence[Measured]) -> None:
        """Enter the errors of some kernels at one layer."""
        self._enter_due()
        slab = call.window // self.at_once
        with_budget = (self.sample.ordinal(call.window) + call.layer) % self.stride == 0 and bool(measured)
        norms: dict[int, torch.Tensor] = {}
        found: list[tuple[Measured, str, dict[str, torch.Tensor], torch.Tensor]] = []
        for one in measured:
            if id(one.exact) not in norms:
                norms[id(one.exact)] = one.exact.norm(dim=-1)
            for name, error in one.errors.items():
                sums = _row_sums(error, one.exact, norms[id(one.exact)])
                figures = _all_rows(sums, call.kv_len[0])
                if one.alone:
                    figures["cache_rms"] = relative_rms(one.exact - one.given, one.given, (1, 3))
                found.append((one, name, figures, _worst_rows(sums)))
        if not with_budget:
            for one, name, figures, _ in found:
                self._enter(call.window, call.layer, name, one.arm.path, figures)
            return
        rows = sampled_rows(call.q.shape[1], seed=self.seed, slab=slab, layer=call.layer)
        on_device = uploaded(rows, call.q.device, torch.int64)
        checked = torch.cat((on_device, *(worst for *_, worst in found)))
        self._due = _DueLayer(
            window=call.window,
            layer=call.layer,
            chosen=Download(checked),
            sampled=len(rows),
            lengths=RowLengths(lengths_of(call.kv_len).of_rows[: call.q.shape[1]]),
            calls=_budget_calls(measured, checked),
            errors=[
                _DueErrors(
                    name=name,
                    arm=one.arm.name,
                    path=one.arm.path,
                    error=_rows_of(one.errors[name], checked),
                    figures=figures,
                    lse=None if one.lse is None or name != one.arm.name else _rows_of(one.lse, checked),
                )
                for one, name, figures, _ in found
            ],
        )

    def _enter_due(self) -> None:
        """Make the budgets of the layer that waits for them, if one does, and enter its figures."""
        if self._due is None:
            return
        due, self._due = self._due, None
        lengths = [due.lengths[row] for row in due.chosen.numbers()]
        budgets: dict[str, Budget] = {}
        rows_of: dict[str, Call] = {}
        for rows, arithmetics in due.calls:
            known_lengths(rows.kv_len, lengths)
            found = error_budgets(rows, list(arithmetics.values()))
            budgets |= zip(arithmetics, found, strict=True)
            rows_of |= dict.fromkeys(arithmetics, rows)
        for name, arm, path, error, figures, lse in due.errors:
            kv_len = rows_of[arm].kv_len[0]
            _some_rows(figures, error, budgets[arm], kv_len, due.sampled)
            if lse is not None:
                _lse_of_rows(figures, rows_of[arm], lse, budgets[arm], kv_len)
            self._enter(due.window, due.layer, name, path, figures)

    def _enter(
        self, window: int, layer: int, name: str, path: str, figures: Mapping[str, torch.Tensor]
    ) -> None:
        self._checks.append((window, layer, name, path))
        self._figures.append(torch.stack([figures[figure] for figure in _FIGURES]))

    def enter_rows(
        self,
        window: int,
        layer: int,
        name: str,
        path: str,
        *,
        error: torch.Tensor,
        exact: torch.Tensor,
        budget: Budget,
        call: Call,
        lse: torch.Tensor | None,
    ) -> None:
        """Enter rows of one window, each with a budget: error, exact [1, rows, H, Dv]; call: those rows; lse
        [1, rows, H], None where the kernel returns none."""
        self._enter_due()
        kv_len = call.kv_len[0]
        figures = _all_rows(_row_sums(error, exact, exact.norm(dim=-1)), kv_len)
        _some_rows(figures, error, budget, kv_len, len(kv_len))
        if lse is not None:
            _lse_of_rows(figures, call, lse, budget, kv_len)
        self._enter(window, layer, name, path, figures)

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        self._enter_due()
        return {"checks": self._checks, "figures": self._figures}

    def restore(self, state: dict[str, Any]) -> None:
        self._checks, self._figures = list(state["checks"]), list(state["figures"])

    def table(self) -> pa.Table:
        """Everything so far as rows of LAYER_SCHEMA."""
        self._enter_due()
        if not self._checks:
            return LAYER_SCHEMA.empty_table()
        # Layers may have unlike numbers of heads.
        sizes = [figures.shape[1:] for figures in self._figures]  # windows and heads of each check
        found = torch.cat([figures.flatten(1) for figures in self._figures], 1).cpu().numpy()
        offsets = np.concatenate([np.repeat(np.arange(count), heads) for count, heads in sizes])
        head = np.concatenate([np.tile(np.arange(heads), count) for count, heads in sizes])
        rows = [count * heads for count, heads in sizes]
        windows, *others = (np.repeat(np.array(x), rows) for x in zip(*self._checks, strict=True))
        columns: list[Any] = [windows + offsets, *others, head, *found]
        arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, LAYER_SCHEMA, strict=True)]
        return pa.Table.from_arrays(arrays, schema=LAYER_SCHEMA)


def _budget_calls(measured: Sequence[Measured], rows: torch.Tensor) -> list[_BudgetCall]:
    """Some rows of what the kernels were given, once for all that share it: what follows from inputs alone is
    computed once then."""
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        groups.setdefault(one.arm.name if one.alone else one.arm.path, []).append(one)
    found = []
    for group in groups.values():
        arithmetics = {}
        for one in group:
            assert one.arm.kernel is not None
            arithmetics[one.arm.name] = one.arm.kernel.arithmetic_of(one.own)
        found.append(_BudgetCall(_as_one_sequence(group[0].own, rows), arithmetics))
    return found


def _rows_of(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of [B, T, H, ...] as `_as_one_sequence` has them, [1, rows, B * H, ...]."""
    return x[:, rows].transpose(0, 1).flatten(1, 2)[None]


def _as_one_sequence(call: Call, rows: torch.Tensor) -> Call:
    """Some rows of sequences of equal lengths, which become KV heads of one: q [1, rows, B * H, D].

    Lists of keys are each sequence's own: of several they become a mask that heads do not share.
    """
    of_rows = call.of_rows(rows)
    keys, mask = of_rows.keys, of_rows.mask
    if len(call.q) > 1 and (keys is not None or mask is not None):
        keys, mask = None, _mask_by_head(call, keys, mask, len(rows))
    q, k, v = (x.transpose(0, 1).flatten(1, 2)[None] for x in (of_rows.q, call.k, call.v))
    return replace(
        call,
        q=q,
        k=k,
        v=v,
        kv_len=of_rows.kv_len[:1],
        keys=keys,
        mask=mask,
        sinks=None if call.sinks is None else call.sinks.repeat(len(call.q)),
        alibi_slopes=None if call.alibi_slopes is None else call.alibi_slopes.repeat(len(call.q)),
    )


def _mask_by_head(
    call: Call, keys: torch.Tensor | None, mask: torch.Tensor | None, rows: int
) -> torch.Tensor:
    """[1, B * H, rows, S] of lists [B, rows, K] and a mask [B or 1, H or 1, rows, S] of some rows."""
    batch, held, heads = len(call.q), call.k.shape[1], call.q.shape[2]
    if mask is None:
        mask = torch.ones((1, 1, rows, held), dtype=torch.bool, device=call.q.device)
    if keys is not None:
        # What lists no key goes into a column that is cut off.
        at = torch.where(keys < 0, held, keys).long()
        seen = torch.zeros((batch, rows, held + 1), dtype=torch.bool, device=mask.device)
        seen = seen.scatter_(2, at, True)[:, None, :, :held]
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)
    return mask.expand(batch, heads, rows, held).flatten(0, 1)[None]


class _RowSums(NamedTuple):
    """What the figures of all rows are made of, [B, T, H] each, in float64."""

    bad: torch.Tensor  # whether the error has a NaN or an Inf, bool
    size: torch.Tensor  # ||error|| of what is finite
    product: torch.Tensor  # <error, exact> likewise
    due: torch.Tensor  # ||exact||


def _row_sums(error: torch.Tensor, exact: torch.Tensor, due: torch.Tensor) -> _RowSums:
    """error, exact [B, T, H, Dv]; due: ||exact||, which kernels share. As few passes over them as there are
    numbers to get: they are the largest tensors of a layer."""
    # A sum of finite float32 results, less what they should be, does not overflow in float64.
    bad = not_finite(error.sum(-1))
    finite = torch.nan_to_num(error, nan=0.0, posinf=0.0, neginf=0.0)
    return _RowSums(bad, finite.norm(dim=-1), (finite * exact).sum(-1), due)


def _all_rows(sums: _RowSums, kv_len: torch.Tensor) -> dict[str, torch.Tensor]:
    """Figures [B, H] of all rows; those of the sampled ones are NaN so far."""
    bad = sums.bad
    power = sums.due.square().sum(1).clamp(min=SMALLEST_SQUARE)
    # A row with NaN or Inf counts among those alone.
    square, product = (torch.where(bad, 0.0, x).sum(1) for x in (sums.size.square(), sums.product))
    figures = dict.fromkeys(_FIGURES, torch.full_like(power, torch.nan))
    figures["relative_rms"] = (square / power).sqrt()
    figures["gain"] = product / power
    figures["nonfinite"] = bad.sum(1).double()
    figures["cache_rms"] = torch.zeros_like(power)
    figures["position"] = (kv_len.long() - 1)[bad.to(torch.int8).argmax(1)].double()
    return figures


def worst_rows(error: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The rows [2] of the largest error of any window and head: relative to the row's own result, and to the
    head's. A fault at one row in a hundred is no longer a matter of luck. error, exact [B, T, H, Dv]."""
    return _worst_rows(_row_sums(error, exact, exact.norm(dim=-1)))


def _worst_rows(sums: _RowSums) -> torch.Tensor:
    tiny = torch.finfo(torch.float64).tiny
    of_row = sums.size / sums.due.clamp(min=tiny)
    of_head = sums.size / sums.due.amax(1, keepdim=True).clamp(min=tiny)
    return torch.stack([share.amax((0, 2)).argmax() for share in (of_row, of_head)])


def _some_rows(
    figures: dict[str, torch.Tensor], error: torch.Tensor, budget: Budget, kv_len: torch.Tensor, sampled: int
) -> None:
    """Enter the figures of the rows that have a budget: the sampled ones come first, then the worst.

    error [1, rows, B * H, Dv], as the budget of `_as_one_sequence` has it; kv_len [rows].
    """
    rows = row_figures(error, budget)
    first = slice(0, sampled)
    finite = rows._replace(nonfinite=torch.zeros_like(rows.nonfinite))
    biases = torch.cat((rows.bias, rows.falls, rows.rises))
    gains = pooled_gain(biases[:, first], rows.power[:, first], 1)
    found = {
        "max_budget_ratio": rows.ratio.amax(1),
        "rms_ratio": pooled_rms(rows.rms[:, first], 1),
        "relative_max": rows.relative.amax(1),
        "vacuous": rows.vacuous[:, first].double().mean(1),
        **dict(zip(("gain_bias", "gain_falls", "gain_rises"), gains[:, None], strict=True)),
        "position": (kv_len.double() - 1)[finite.severity.argmax(1)],
    }
    windows = figures["nonfinite"].shape
    # A NaN anywhere says more about where a bug is than the largest finite error.
    seen = figures["position"], figures["nonfinite"] > 0
    figures.update({name: x.view(windows) for name, x in found.items()})
    figures["position"] = torch.where(seen[1], seen[0], figures["position"])


def _lse_of_rows(
    figures: dict[str, torch.Tensor],
    call: Call,
    lse: torch.Tensor,
    budget: Budget,
    kv_len: torch.Tensor,
) -> None:
    """Enter the figures of the log-sum-exp of the rows that have a budget, [1, rows, B * H] as theirs.

    call: whose ALiBi slopes are looked at, if there are any: of these rows then.
    """
    ratio = lse_ratio(call, lse, budget)[0]
    worst = torch.where(torch.isnan(ratio), -1.0, ratio).argmax(0)
    windows = figures["nonfinite"].shape
    figures["lse_budget_ratio"] = ratio.gather(0, worst[None])[0].view(windows)
    figures["lse_position"] = (kv_len.double() - 1)[worst].view(windows)


def lse_fault_of(errors: HeadErrors) -> str | None:
    """The same of the log-sum-exp."""
    if not errors.lse_budget_ratio > 1:
        return None
    where = Place(errors.window, errors.layer, int(errors.lse_position), errors.head)
    return lse_fault(errors.lse_budget_ratio, f" at {where}")


def fault_of(errors: HeadErrors) -> str | None:
    """The sentence that makes an arm `broken`, or None."""
    where = Place(errors.window, errors.layer, errors.position, errors.head)
    return budget_fault(errors.nonfinite, errors.max_budget_ratio, errors.relative_max, f" at {where}")
