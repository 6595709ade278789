"""The evidence about each arm, and about each candidate against its baseline, with the verdict on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc

from verify.arms.alone import ONE_TOKEN, alone_name, broken_promise
from verify.arms.arm import Arm, Findings
from verify.arms.kernel_errors import faults_in_place
from verify.judge.statistics import (
    DistanceRatio,
    PairedDifference,
    distance_ratio,
    paired_difference,
    windows_to_decide,
)
from verify.judge.verdict import Decision, PairEvidence, decide
from verify.kernels.judging.figures import shared_fault
from verify.kernels.trace import LaunchTrace
from verify.ppl.evidence.alone import SingleTokensBeside, asked_and_other
from verify.ppl.evidence.judged_calls import judged_calls
from verify.ppl.evidence.scores import Scores
from verify.ppl.groups import GroupResult
from verify.ppl.perplexity import perplexity
from verify.ppl.record import ArmRecord, FreeRatio, FrozenMeans, PairRecord, frozen_name

# More windows than this are no advice.
MOST_WINDOWS = 100_000


class ChangedPlan(NamedTuple):
    """What went through a plan or kernel that the reference did not run: shares of scored tokens and of
    attention rows, and the n_kv at which it did."""

    tokens: float
    rows: float
    n_kv: frozenset[int]


def arm_record(arm: Arm, findings: Findings, scores: Scores) -> ArmRecord:
    """One arm: free-running, and the means of its pass with frozen casts."""
    frozen_pass = frozen_name(arm.name)
    ppl = perplexity(scores.column(arm.name, "nll").ravel())
    frozen_kld = scores.mean(frozen_pass, "kld_to_exact")
    frozen = FrozenMeans(nll_mean=scores.mean(frozen_pass, "nll"), kld_to_exact_mean=frozen_kld)
    return ArmRecord(
        name=arm.name,
        role=arm.role,
        spec=arm.spec,
        path=arm.path,
        calls="" if arm.form.is_plain else str(arm.form),
        ppl=ppl.ppl,
        ppl_se=ppl.se,
        nll_mean=ppl.nll_mean,
        tokens=ppl.tokens,
        kld_to_exact_mean=scores.mean(arm.name, "kld_to_exact"),
        frozen=None if math.isnan(frozen_kld) else frozen,
        failure=findings.failure,
        bitwise_equal=None if arm.reference is None else findings.kept_all_bits,
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


def changed_plan(candidate: LaunchTrace, reference: LaunchTrace, scored_n_kv: range) -> ChangedPlan:
    """scored_n_kv: visible keys of the scored positions of a window."""
    changed = candidate.differs_from(reference)
    rows = sum(count for (_, n_kv, _), count in candidate.rows.items() if n_kv in changed)
    return ChangedPlan(
        sum(n in changed for n in scored_n_kv) / max(len(scored_n_kv), 1),
        rows / max(candidate.total_rows, 1),
        changed,
    )


def pair_record(
    candidate: Arm,
    reference: Arm,
    result: GroupResult,
    scores: Scores,
    *,
    changed: ChangedPlan,
    floor: str | None,
    min_coverage: float,
    margin: float,
    allow_same: bool,
    rows: int,
    unsteady: str = "",
    single_tokens: SingleTokensBeside,
    cache_faults: Sequence[str] = (),
) -> PairRecord:
    """Everything about one candidate, and the verdict on it. rows: that an arm computes of a window."""
    name, other = candidate.name, reference.name
    of_candidate, of_reference = result.findings[name], result.findings[other]
    nll, nll_reference = both(scores, name, other, "nll")
    equal = len(nll) > 0 and of_candidate.kept_all_bits and single_tokens.equal
    frozen_floor = frozen_name(floor) if floor else None
    distance = distance_between(frozen_name(name), frozen_name(other), frozen_floor, scores)
    free = distance_between(name, other, floor, scores)
    faults = [
        *_faults(name, "candidate", result, nll),
        *broken_promise(candidate.spec, "candidate", *asked_and_other(result.alone, name)),
        *_faults(other, f"baseline {reference.spec}", result, nll_reference),
        *cache_faults,
    ]
    shared = ""
    if equal and (both_have := _faults(other, "both", result, nll_reference)):
        shared, faults = shared_fault(both_have), []
    elif overflows_nowhere_else(result, name):
        shared = (
            f"both: NaN or Inf in {of_candidate.nonfinite_rows} attention rows, in elements that are so with"
            " the baseline too: not this change"
        )
        faults = [
            *_faults(name, "candidate", result, nll, nonfinite=False),
            *broken_promise(candidate.spec, "candidate", *asked_and_other(result.alone, name)),
            *_faults(other, f"baseline {reference.spec}", result, nll_reference, nonfinite=False),
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
            same_spec=(candidate.spec, candidate.form) == (reference.spec, reference.form),
            coverage=changed.tokens,
            bitwise_equal=equal,
            distance=distance,
            not_compared=of_candidate.refusal("candidate") or of_reference.refusal("baseline"),
            min_coverage=min_coverage,
            margin=margin,
            allow_same=allow_same,
            unsteady=unsteady,
            alone=single_tokens.judge(margin),
            ran=f", {single_tokens}" if single_tokens.asked else "",
            through="another plan" if candidate.form == reference.form else str(candidate.form),
            frozen_kld=frozen_kld,
            reference=distance_to,
            narrowed_by=advice(distance, len(frozen_klds[0]), margin),
        )
    )
    if shared:
        decision = Decision(decision.verdict, [*decision.reasons, shared])
    between, _ = both(scores, name, other, "kld_to_baseline")
    top1, top1_reference = both(scores, name, other, "top1")
    difference = difference_of(scores, name, other)
    finite = np.isfinite(nll) & np.isfinite(nll_reference)
    return PairRecord(
        reference=other,
        candidate=name,
        path=candidate.path,
        verdict=decision.verdict,
        reasons=decision.reasons,
        theta=distance.theta if distance else None,
        theta_se=distance.theta_se if distance else None,
        distance_ratio=distance.ratio if distance else None,
        distance_ratio_ci=(distance.low, distance.high) if distance else None,
        energy_ratio=_known(distance.energy_ratio) if distance else None,
        distance_kind="frozen-cast",
        distance_to=distance_to,
        distance_scope=distance.scope if distance else None,
        free=FreeRatio(distance_ratio=free.ratio, distance_ratio_ci=(free.low, free.high)) if free else None,
        frozen_kld=frozen_kld[0],
        frozen_kld_reference=frozen_kld[1],
        cost_nats=cost.mean,
        cost_nats_se=cost.se,
        dlnppl=difference.mean,
        dlnppl_se=difference.se,
        kld_mean=float(between.mean()) if between.size else math.nan,
        kld_max=float(between.max()) if between.size else math.nan,
        top1_changes=int(((top1 != top1_reference) & finite).sum()),
        tokens=int(nll.size),
        measured_tokens=int(frozen_klds[0].size),
        bitwise_equal=equal,
        coverage=changed.tokens,
        coverage_rows=changed.rows,
        changed_n_kv=(min(changed.n_kv), max(changed.n_kv)) if changed.n_kv else None,
        detectable_distance_ratio=distance.detectable if distance else None,
        judged_calls=judged_calls(
            result,
            name,
            calls_of_window=candidate.form.calls_of(rows, candidate.path),
            sequences=candidate.form.sequences,
        ),
    )


def _known(x: float) -> float | None:
    return None if math.isnan(x) else x


def advice(distance: DistanceRatio | None, windows: int, margin: float) -> str:
    """How many windows would decide what is inconclusive."""
    if distance is None or not windows:
        return "more windows (--chunks) narrow it"
    if not math.isfinite(distance.theta_se):
        return "no interval comes of so few tokens: more windows (--chunks), or a longer --ctx-size"
    needed = windows_to_decide(distance, windows, margin)
    if needed > MOST_WINDOWS:
        return f"no number of windows decides a ratio this near to the margin of {margin:g}"
    return f"about {math.ceil(needed)} measured windows would decide (--chunks, --measured-windows)"


def overflows_nowhere_else(result: GroupResult, arm: str) -> bool:
    """Whether an arm has NaN or Inf, in place or running freely, and none where its reference has none."""
    names = (arm, alone_name(arm))
    rows = [result.layers.filter(pc.equal(result.layers["arm"], name)) for name in names]
    found = result.findings[arm]
    has = found.nonfinite_rows or any(pc.sum(x["nonfinite"]).as_py() for x in rows)
    return bool(has) and not found.nonfinite_beyond and not found.failed


def _faults(
    arm: str, called: str, result: GroupResult, nll: np.ndarray, *, nonfinite: bool = True
) -> list[str]:
    """What makes an arm `broken`, as sentences that begin with `called`. nonfinite: see `faults_in_place`."""
    findings = result.findings[arm]
    faults = []
    if findings.failure is not None and not findings.refused:
        faults.append(f"{called} failed at {findings.failure_place}: {findings.failure}")
    if findings.unsteady is not None:
        faults.append(f"{called} is unsteady: another result for the same call at {findings.unsteady} away")
    if not nonfinite:
        pass
    elif findings.nonfinite_place is not None:
        faults.append(
            f"{called}: NaN or Inf in {findings.nonfinite_rows} attention rows, first at"
            f" {findings.nonfinite_place}"
        )
    elif not np.isfinite(nll).all():
        faults.append(f"{called}: NaN or Inf in the logits")
    return [
        *faults,
        *faults_in_place(result.layers, arm, called, nonfinite=nonfinite),
        *faults_in_place(result.layers, alone_name(arm), f"{called}, {ONE_TOKEN}", nonfinite=nonfinite),
    ]
