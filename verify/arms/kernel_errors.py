"""What the kernels' own errors on the exact arm's inputs amount to: `in_place` of run.json, and faults.

A budget breach anywhere is a bug by itself. Two more figures are taken over the whole run, since they see
what no single element shows: the gain, a common factor, and the root mean square of error over expected size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from verify.arms.arm import Arm
from verify.arms.own_error import HeadErrors, fault_of, lse_fault_of
from verify.arms.records import InPlaceRecord, LayerErrors
from verify.kernels.call import Shape
from verify.kernels.judging.apart import HeadApart, head_apart
from verify.kernels.judging.figures import (
    GAIN_UNITS,
    apart_fault,
    bias_said,
    gain_fault,
    gain_limit,
    graveness,
    rms_fault,
    rms_limit,
)
from verify.kernels.numbers import FLOAT_TYPES, U_F32

# Layer, head and window: fewer say nothing about a mean.
FEWEST_CHECKS = 4
# Over fewer layers the scatter of a head's gain is not known.
FEWEST_LAYERS = 8
# Where they were measured.
IN_PLACE = ", on the exact arm's own q, k and v"


class KernelErrors(NamedTuple):
    """One kernel's errors in place, over all layers, heads and windows."""

    checks: int  # of a layer, head and window
    max_budget_ratio: float  # largest |error| / budget; NaN: none was derived
    vacuous: float  # share of sampled rows whose budget says nothing
    relative_rms: float  # ||error|| / ||exact||
    rms_ratio: float  # error over its expected size
    gain: float  # mean of <error, exact> / <exact, exact>
    gain_se: float  # standard error; layers, heads and windows taken as independent
    gain_limit: float  # what rounding alone does not exceed
    # The same as the arithmetic is stated: less where the limit rests on one that is only assumed.
    gain_stated: float
    # Largest |lse error| / bound; NaN where it returns none.
    lse_budget_ratio: float = math.nan

    @property
    def gain_z(self) -> float:
        return self.gain / self.gain_se if self.gain_se > 0 else math.nan


def rows_of(layers: pa.Table, arm: str) -> pa.Table:
    return layers.filter(pc.equal(layers["arm"], arm))


def kernel_errors(rows: pa.Table) -> KernelErrors | None:
    """Of the rows of one arm in layers.parquet; None where there are none."""
    if not rows.num_rows:
        return None
    figure = {name: rows[name].to_numpy() for name in rows.column_names if name not in ("arm", "path")}
    gain = figure["gain"]
    se = float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) >= FEWEST_CHECKS else math.inf
    one_way = figure["gain_rises" if gain.mean() > 0 else "gain_falls"]
    return KernelErrors(
        checks=len(gain),
        max_budget_ratio=_most(figure["max_budget_ratio"]),
        vacuous=_mean(figure["vacuous"]),
        relative_rms=float(np.sqrt(np.mean(figure["relative_rms"] ** 2))),
        rms_ratio=math.sqrt(_mean(figure["rms_ratio"] ** 2)),
        gain=float(gain.mean()),
        gain_se=se,
        gain_limit=gain_limit(se, _mean(one_way), U_F32),
        gain_stated=gain_limit(se, _mean(figure["gain_bias"]), U_F32),
        # Runs of before had none.
        lse_budget_ratio=_most(figure.get("lse_budget_ratio", np.empty(0))),
    )


def in_place_record(layers: pa.Table, arm: str) -> InPlaceRecord | None:
    """The arm's entry of `in_place`, with a line a layer; None for an arm without a kernel."""
    rows = rows_of(layers, arm)
    whole = kernel_errors(rows)
    if whole is None:
        return None
    by_layer = []
    for layer in pc.unique(rows["layer"]).to_pylist():
        part = kernel_errors(rows.filter(pc.equal(rows["layer"], layer)))
        assert part is not None
        by_layer.append(
            LayerErrors(
                layer=layer,
                max_budget_ratio=part.max_budget_ratio,
                relative_rms=part.relative_rms,
                rms_ratio=part.rms_ratio,
                gain=part.gain,
            )
        )
    return InPlaceRecord(
        arm=arm,
        checks=whole.checks,
        max_budget_ratio=whole.max_budget_ratio,
        vacuous=whole.vacuous,
        relative_rms=whole.relative_rms,
        rms_ratio=whole.rms_ratio,
        gain_mean=whole.gain,
        gain_se=whole.gain_se,
        gain_z=whole.gain_z,
        gain_limit=whole.gain_limit,
        lse_budget_ratio=None if math.isnan(whole.lse_budget_ratio) else whole.lse_budget_ratio,
        layers=by_layer,
    )


def faults_in_place(layers: pa.Table, arm: str, called: str, *, nonfinite: bool = True) -> list[str]:
    """What makes a kernel `broken`, as sentences that begin with `called`.

    nonfinite: whether NaN and Inf do; else they are left aside.
    """
    rows = rows_of(layers, arm)
    whole = kernel_errors(rows)
    if whole is None:
        return []
    suspects = rows.filter(
        pc.or_kleene(
            pc.greater(rows["nonfinite"], 0),
            pc.or_kleene(pc.greater(rows["max_budget_ratio"], 1), pc.greater(rows["relative_max"], 0)),
        )
    )
    kept = {} if nonfinite else {"nonfinite": 0}
    wrong = [errors for row in suspects.to_pylist() if fault_of(errors := HeadErrors(**row | kept))]
    faults = []
    if wrong:
        worst = max(wrong, key=lambda e: graveness(e.nonfinite, e.max_budget_ratio, e.relative_max))
        faults.append(
            f"{called}: {fault_of(worst)}{IN_PLACE}"
            f" ({len(wrong)} of {whole.checks} checks of a layer and head failed)"
        )
    if whole.lse_budget_ratio > 1:
        off = [HeadErrors(**x) for x in rows.filter(pc.greater(rows["lse_budget_ratio"], 1)).to_pylist()]
        worst = max(off, key=lambda errors: errors.lse_budget_ratio)
        faults.append(
            f"{called}: {lse_fault_of(worst)}{IN_PLACE}"
            f" ({len(off)} of {whole.checks} checks of a layer and head failed)"
        )
    faults += faults_in_common(whole, called)
    apart = head_apart_in_layers(rows)
    if apart is not None and (fault := apart_fault(apart.shift, apart.limit, apart.head)):
        faults.append(f"{called}: {fault}, over all layers{IN_PLACE}")
    return faults


def head_apart_in_layers(rows: pa.Table) -> HeadApart | None:
    """The head whose gain, over all layers, is farthest from the other heads', of one arm's rows.

    Heads of a model attend otherwise, and rounding makes other gains of them. But a head's number means
    nothing from layer to layer: over the layers a right kernel's heads are alike, and how far a head's gain
    scatters from layer to layer is what chance makes of its mean. None of few layers or heads, of layers with
    unlike heads, and where results are NaN or Inf.
    """
    layers, heads = (np.unique(rows[name].to_numpy()) for name in ("layer", "head"))
    if len(layers) < FEWEST_LAYERS or bool(np.any(rows["nonfinite"].to_numpy())):
        return None
    sums, counts = (np.zeros((len(layers), len(heads))) for _ in "ab")
    at = tuple(
        np.searchsorted(of, rows[name].to_numpy()) for of, name in ((layers, "layer"), (heads, "head"))
    )
    np.add.at(sums, at, rows["gain"].to_numpy())
    np.add.at(counts, at, 1)
    if not counts.all():
        return None
    gains = sums / counts
    gains -= np.median(gains, axis=1, keepdims=True)
    deviations = gains.std(axis=0, ddof=1) / math.sqrt(len(layers))
    found = head_apart(torch.from_numpy(gains.mean(axis=0)), torch.from_numpy(deviations))
    if found is None:
        return None
    least = max(abs(found.centre), GAIN_UNITS * U_F32)
    return found._replace(head=int(heads[found.head]), limit=max(found.limit, least))


def faults_in_common(whole: KernelErrors, called: str) -> list[str]:
    """What no single element shows: a gain, and errors larger than the kernel's arithmetic makes them."""
    found = (
        gain_fault(whole.gain, whole.gain_limit, whole.relative_rms, IN_PLACE, whole.gain_z),
        rms_fault(whole.rms_ratio, rms_limit(whole.checks), IN_PLACE),
    )
    return [f"{called}: {fault}" for fault in found if fault]


def said_in_common(layers: pa.Table, arms: Sequence[Arm], shape: Shape) -> list[str]:
    """What is no fault of a kernel and worth a word: a bias that roundings can make. shape: of any call."""
    found = []
    for arm in arms:
        whole = kernel_errors(rows_of(layers, arm.name)) if arm.kernel is not None else None
        if arm.kernel is None or whole is None or arm.role not in ("baseline", "candidate"):
            continue
        u_out = FLOAT_TYPES[arm.kernel.arithmetic(shape, arm.path).out].u
        said = bias_said(whole.gain, whole.gain_stated, whole.gain_limit, u_out, IN_PLACE)
        found += [f"{arm.spec}: {said}"] if said else []
    return found


def _mean(values: np.ndarray) -> float:
    """Of what is not NaN; NaN where nothing is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _most(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.max()) if len(values) else math.nan
