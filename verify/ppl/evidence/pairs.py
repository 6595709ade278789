"""The evidence about each arm, and about each candidate against its baseline, with the verdict on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from verify.arms.arm import Arm
from verify.arms.kernel_errors import faults_in_place
from verify.judge.statistics import DistanceRatio, PairedDifference, distance_ratio, paired_difference
from verify.judge.verdict import Decision, PairEvidence, decide
from verify.kernels.trace import LaunchTrace
from verify.ppl.evidence.scores import Scores
from verify.ppl.frozen import frozen_name
from verify.ppl.groups import GroupResult
from verify.ppl.perplexity import Perplexity, perplexity


class ArmSummary(NamedTuple):
    """One arm: free-running, and the mean nll and KLD to exact of its pass with frozen casts (NaN: none)."""

    arm: Arm
    perplexity: Perplexity
    kld_to_exact: float
    frozen_nll: float
    frozen_kld: float


class Coverage(NamedTuple):
    """What went through a plan or kernel that the reference did not run: shares of scored tokens and of
    attention rows, and the n_kv at which it did."""

    tokens: float
    rows: float
    changed: frozenset[int]


class PairSummary(NamedTuple):
    """One candidate against its baseline: what was measured, and the verdict on it.

    distance, cost, frozen_kld (candidate, reference): casts frozen, on `measured_tokens`; free, difference,
    kld_mean, kld_max, top1_changes: free-running, on `tokens`. distance_to: whose distance the ratio is to:
    `reference`, or `floor` where the reference is exact to the bit.
    """

    reference: Arm
    candidate: Arm
    decision: Decision
    coverage: Coverage
    distance: DistanceRatio | None
    free: DistanceRatio | None
    frozen_kld: tuple[float, float]
    cost: PairedDifference
    difference: PairedDifference
    kld_mean: float
    kld_max: float
    top1_changes: int
    tokens: int
    measured_tokens: int
    bitwise_equal: bool
    distance_to: str


def summarize_arm(arm: Arm, scores: Scores) -> ArmSummary:
    frozen = frozen_name(arm.name)
    return ArmSummary(
        arm,
        perplexity(scores.column(arm.name, "nll").ravel()),
        scores.mean(arm.name, "kld_to_exact"),
        scores.mean(frozen, "nll"),
        scores.mean(frozen, "kld_to_exact"),
    )


def distance_between(
    candidate: str, reference: str, floor: str | None, scores: Scores
) -> DistanceRatio | None:
    """The ratio of two passes' distances to exact; None without finite divergences of both.

    floor: the pass that stands in for a reference which is exact to the bit and so has no distance, where the
    candidate has one.
    """
    kld, kld_reference = both(scores, candidate, reference, "kld_to_exact")
    if not len(kld) or not (np.isfinite(kld).all() and np.isfinite(kld_reference).all()):
        return None
    if floor is not None and only_reference_exact(kld, kld_reference):
        kld, kld_reference = both(scores, candidate, floor, "kld_to_exact")
    return distance_ratio(kld, kld_reference)


def only_reference_exact(kld: np.ndarray, kld_reference: np.ndarray) -> bool:
    """Whether the reference is exact to the bit, and the candidate is not."""
    return bool(kld.any() and not kld_reference.any())


def both(scores: Scores, candidate: str, reference: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of two passes over the windows that both ran."""
    _, of_candidate, of_reference = np.intersect1d(
        scores.windows(candidate), scores.windows(reference), assume_unique=True, return_indices=True
    )
    return scores.column(candidate, name)[of_candidate], scores.column(reference, name)[of_reference]


def difference_of(scores: Scores, candidate: str, reference: str) -> PairedDifference:
    """Of the mean nll."""
    nll, nll_reference = both(scores, candidate, reference, "nll")
    return paired_difference(nll, nll_reference) if len(nll) else PairedDifference(math.nan, math.nan)


def coverage_of(candidate: LaunchTrace, reference: LaunchTrace, scored_n_kv: range) -> Coverage:
    """scored_n_kv: visible keys of the scored positions of a window."""
    changed = candidate.differs_from(reference)
    rows = sum(count for (_, n_kv, _), count in candidate.rows.items() if n_kv in changed)
    return Coverage(
        sum(n in changed for n in scored_n_kv) / max(len(scored_n_kv), 1),
        rows / max(candidate.total_rows, 1),
        changed,
    )


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
) -> PairSummary:
    """Everything about one candidate. scored_n_kv: visible keys of the scored positions of a window."""
    name, other = candidate.name, reference.name
    nll, nll_reference = both(scores, name, other, "nll")
    found = result.findings[name]
    equal = len(nll) > 0 and not candidate.failed and found.attention_equal and found.logits_equal
    frozen_floor = frozen_name(floor) if floor else None
    distance = distance_between(frozen_name(name), frozen_name(other), frozen_floor, scores)
    coverage = coverage_of(result.traces[name], result.traces[other], scored_n_kv)
    faults = [
        *_faults(candidate, "candidate", result, nll),
        *_faults(reference, f"baseline {reference.spec}", result, nll_reference),
    ]
    frozen_kld = (
        scores.mean(frozen_name(name), "kld_to_exact"),
        scores.mean(frozen_name(other), "kld_to_exact"),
    )
    cost = difference_of(scores, frozen_name(name), frozen_name(other))
    frozen_klds = both(scores, frozen_name(name), frozen_name(other), "kld_to_exact")
    distance_to = "floor" if frozen_floor and only_reference_exact(*frozen_klds) else "reference"
    if distance_to == "floor":
        frozen_kld = frozen_kld[0], scores.mean(frozen_floor or "", "kld_to_exact")
    decision = decide(
        PairEvidence(
            faults=faults,
            same_spec=candidate.spec == reference.spec,
            coverage=coverage.tokens,
            bitwise_equal=equal,
            distance=distance,
            not_compared=refusal(candidate, "candidate") or refusal(reference, "baseline"),
            min_coverage=min_coverage,
            margin=margin,
            frozen_kld=frozen_kld,
            reference=distance_to,
        )
    )
    between, _ = both(scores, name, other, "kld_to_baseline")
    top1, top1_reference = both(scores, name, other, "top1")
    return PairSummary(
        reference,
        candidate,
        decision,
        coverage,
        distance,
        distance_between(name, other, floor, scores),
        frozen_kld,
        cost,
        difference_of(scores, name, other),
        float(between.mean()) if between.size else math.nan,
        float(between.max()) if between.size else math.nan,
        int(((top1 != top1_reference) & np.isfinite(nll) & np.isfinite(nll_reference)).sum()),
        int(nll.size),
        int(frozen_klds[0].size),
        equal,
        distance_to,
    )


def refusal(arm: Arm, called: str) -> str:
    """That a kernel does not take what the model asks for, or nothing."""
    found = arm.findings
    return f"{called} does not take this call, {found.failure}" if found.refused else ""


def _faults(arm: Arm, called: str, result: GroupResult, nll: np.ndarray) -> list[str]:
    """What makes an arm `broken`, as sentences that begin with `called`."""
    found = result.findings[arm.name]
    faults = []
    if found.failure is not None and not found.refused:
        faults.append(f"{called} failed at {found.failure_place}: {found.failure}")
    if found.unsteady is not None:
        faults.append(f"{called} gave another result for the same call at {found.unsteady} away")
    if found.nonfinite_place is not None:
        faults.append(
            f"{called}: NaN or Inf in {found.nonfinite_rows} attention rows, first at {found.nonfinite_place}"
        )
    elif not np.isfinite(nll).all():
        faults.append(f"{called}: NaN or Inf in the logits")
    return faults + faults_in_place(result.layers, arm.name, called)


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
    frozen = None
    if not math.isnan(summary.frozen_kld):
        frozen = {"nll_mean": summary.frozen_nll, "kld_to_exact_mean": summary.frozen_kld}
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
        "frozen": frozen,
        "failure": arm.findings.failure,
    }


def pair_json(pair: PairSummary) -> dict[str, Any]:
    d, free, changed = pair.distance, pair.free, pair.coverage.changed
    return {
        "reference": pair.reference.name,
        "candidate": pair.candidate.name,
        "path": pair.candidate.path,
        "verdict": pair.decision.verdict,
        "reasons": pair.decision.reasons,
        "theta": d.theta if d else None,
        "theta_se": d.theta_se if d else None,
        "distance_ratio": d.ratio if d else None,
        "distance_ratio_ci": [d.low, d.high] if d else None,
        "distance_kind": "frozen-cast",
        "distance_to": pair.distance_to,
        "distance_scope": d.scope if d else None,
        "free": {"distance_ratio": free.ratio, "distance_ratio_ci": [free.low, free.high]} if free else None,
        "frozen_kld": pair.frozen_kld[0],
        "frozen_kld_reference": pair.frozen_kld[1],
        "cost_nats": pair.cost.mean,
        "cost_nats_se": pair.cost.se,
        "dlnppl": pair.difference.mean,
        "dlnppl_se": pair.difference.se,
        "kld_mean": pair.kld_mean,
        "kld_max": pair.kld_max,
        "top1_changes": pair.top1_changes,
        "tokens": pair.tokens,
        "measured_tokens": pair.measured_tokens,
        "bitwise_equal": pair.bitwise_equal,
        "coverage": pair.coverage.tokens,
        "coverage_rows": pair.coverage.rows,
        "changed_n_kv": [min(changed), max(changed)] if changed else None,
        "detectable_distance_ratio": d.detectable if d else None,
    }
