"""From what the groups left to the evidence about each pair of arms, and to `run.json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from kernels.detectors import LARGEST_RELATIVE_ERROR
from verify.arms import Arm
from verify.groups import GroupResult
from verify.inplace import HeadErrors, fault_of
from verify.perplexity import Perplexity, perplexity
from verify.statistics import DistanceRatio, PairedDifference, distance_ratio, paired_difference
from verify.verdict import Decision, PairEvidence, decide


class ArmSummary(NamedTuple):
    arm: Arm
    perplexity: Perplexity
    kld_to_exact: float


class PairSummary(NamedTuple):
    """One candidate against its baseline: what was measured, and the verdict on it."""

    reference: Arm
    candidate: Arm
    decision: Decision
    coverage: float
    distance: DistanceRatio | None
    difference: PairedDifference
    kld_mean: float
    kld_max: float
    top1_changes: int
    tokens: int
    bitwise_equal: bool


class Scores:
    """Columns of tokens.parquet by arm, as arrays [windows, scored]."""

    def __init__(self, result: GroupResult, scored: int) -> None:
        self._table, self._scored = result.tokens, scored
        self._arms: dict[str, Any] = {}

    def column(self, arm: str, name: str) -> np.ndarray:
        """[windows, scored]; no windows where the arm failed. A window that it did not finish is left out."""
        if arm not in self._arms:
            self._arms[arm] = self._table.filter(pc.equal(self._table["arm"], arm))
        values: np.ndarray = self._arms[arm][name].to_numpy()
        whole = len(values) // self._scored * self._scored
        return values[:whole].reshape(-1, self._scored)


def summarize_arm(arm: Arm, scores: Scores) -> ArmSummary:
    nll = scores.column(arm.name, "nll")
    kld = scores.column(arm.name, "kld_to_exact")
    return ArmSummary(arm, perplexity(nll.ravel()), float(kld.mean()) if kld.size else math.nan)


def summarize_pair(
    candidate: Arm,
    reference: Arm,
    result: GroupResult,
    scores: Scores,
    *,
    scored_n_kv: range,
    floor: str | None,
    min_coverage: float,
    margin: float,
    seed: int,
) -> PairSummary:
    """Everything about one candidate. scored_n_kv: visible keys of the scored positions of a window."""
    names = candidate.name, reference.name
    nll, nll_reference = (scores.column(name, "nll") for name in names)
    kld, kld_reference = (scores.column(name, "kld_to_exact") for name in names)
    windows = min(len(nll), len(nll_reference))
    nll, nll_reference, kld, kld_reference = (x[:windows] for x in (nll, nll_reference, kld, kld_reference))
    found = result.findings[candidate.name]
    equal = windows > 0 and not candidate.failed and found.attention_equal and found.logits_equal
    finite = windows > 0 and bool(np.isfinite(kld).all() and np.isfinite(kld_reference).all())
    distance = None
    if finite:
        floor_kld = scores.column(floor, "kld_to_exact")[:windows] if floor else None
        if floor_kld is not None and not kld_reference.any():
            # A reference that is exact to the bit has no distance of its own: the floor stands in for it.
            kld_reference = floor_kld
        distance = distance_ratio(kld, kld_reference, seed)
    changed = result.traces[candidate.name].differs_from(result.traces[reference.name])
    coverage = sum(n in changed for n in scored_n_kv) / max(len(scored_n_kv), 1)
    faults = [
        *_faults(candidate, "candidate", result, nll),
        *_faults(reference, f"baseline {reference.spec}", result, nll_reference),
    ]
    decision = decide(
        PairEvidence(
            faults=faults,
            same_spec=candidate.spec == reference.spec,
            coverage=coverage,
            bitwise_equal=equal,
            distance=distance,
            min_coverage=min_coverage,
            margin=margin,
        )
    )
    between = scores.column(candidate.name, "kld_to_baseline")[:windows]
    top1 = scores.column(candidate.name, "top1")[:windows] != scores.column(reference.name, "top1")[:windows]
    return PairSummary(
        reference,
        candidate,
        decision,
        coverage,
        distance,
        paired_difference(nll, nll_reference) if windows else PairedDifference(math.nan, math.nan),
        float(between.mean()) if between.size else math.nan,
        float(between.max()) if between.size else math.nan,
        int(top1.sum()),
        int(nll.size),
        equal,
    )


def _faults(arm: Arm, called: str, result: GroupResult, nll: np.ndarray) -> list[str]:
    """What makes an arm `broken`, as sentences that begin with `called`."""
    found = result.findings[arm.name]
    faults = []
    if found.failure is not None:
        faults.append(f"{called} failed at {found.failure_place}: {found.failure}")
    if found.nonfinite_place is not None:
        faults.append(
            f"{called}: NaN or Inf in {found.nonfinite_rows} attention rows, first at {found.nonfinite_place}"
        )
    elif not np.isfinite(nll).all():
        faults.append(f"{called}: NaN or Inf in the logits")
    table = result.layers.filter(pc.equal(result.layers["arm"], arm.name))
    # Of many thousand checks hardly any fails: most are sorted out before they become Python's.
    largest = pc.max_element_wise(table["max_budget_ratio"], table["relative_max"])
    suspect = pc.or_(pc.greater(table["nonfinite"], 0), pc.greater(largest, LARGEST_RELATIVE_ERROR))
    checks = [HeadErrors(**row) for row in table.filter(suspect).to_pylist()]
    wrong = [errors for errors in checks if fault_of(errors)]
    if wrong:
        worst = max(wrong, key=lambda e: (e.nonfinite > 0, max(e.max_budget_ratio, e.relative_max)))
        faults.append(
            f"{called}: {fault_of(worst)}, on the exact arm's own q, k and v"
            f" ({len(wrong)} of {table.num_rows} checks of a layer and head failed)"
        )
    return faults


def layer_summary(arm: Arm, result: GroupResult) -> dict[str, Any]:
    """The in-place checks of one arm, over all layers, heads and windows."""
    table = result.layers.filter(pc.equal(result.layers["arm"], arm.name))
    if not table.num_rows:
        return {}
    gains = table["gain"].to_numpy()
    return {
        "arm": arm.name,
        "checks": table.num_rows,
        "max_budget_ratio": float(pc.max(table["max_budget_ratio"]).as_py()),
        "relative_rms": float(np.sqrt(np.mean(np.square(table["relative_rms"].to_numpy())))),
        "gain_mean": float(gains.mean()),
        "gain_se": float(gains.std() / math.sqrt(max(len(gains) - 1, 1))),
        "vacuous": float(pc.mean(table["vacuous"]).as_py()),
    }


def coverage_lines(arms: Sequence[Arm], result: GroupResult) -> list[dict[str, Any]]:
    """What every kernel launched, as `run.json` lists it."""
    return [
        {"arm": arm.name, "spec": arm.spec, **line.to_json()}
        for arm in arms
        if arm.name in result.traces
        for line in result.traces[arm.name].coverage()
    ]


def arm_json(summary: ArmSummary) -> dict[str, Any]:
    arm, ppl = summary.arm, summary.perplexity
    return {
        "name": arm.name,
        "role": arm.role,
        "spec": arm.spec,
        "path": arm.path,
        "ppl": ppl.ppl,
        "ppl_se": ppl.se,
        "nll_mean": ppl.nll_mean,
        "tokens": ppl.tokens,
        "kld_to_exact_mean": summary.kld_to_exact,
        "failure": arm.findings.failure,
    }


def pair_json(pair: PairSummary) -> dict[str, Any]:
    d = pair.distance
    return {
        "reference": pair.reference.name,
        "candidate": pair.candidate.name,
        "path": pair.candidate.path,
        "verdict": pair.decision.verdict,
        "reasons": pair.decision.reasons,
        "distance_ratio": d.ratio if d else None,
        "distance_ratio_ci": [d.low, d.high] if d else None,
        "distance_kind": "free-running",
        "distance_scope": d.scope if d else None,
        "dlnppl": pair.difference.mean,
        "dlnppl_se": pair.difference.se,
        "kld_mean": pair.kld_mean,
        "kld_max": pair.kld_max,
        "top1_changes": pair.top1_changes,
        "tokens": pair.tokens,
        "bitwise_equal": pair.bitwise_equal,
        "coverage": pair.coverage,
        "detectable_distance_ratio": d.detectable if d else None,
    }
