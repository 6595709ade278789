"""The candidate's place among the noise arms: `noise` of run.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from verify.arms.arm import Arm
from verify.arms.kernel_errors import faults_in_place
from verify.judge.statistics import CONFIDENCE
from verify.ppl.evidence.pairs import PairSummary, both, difference_of, distance_between
from verify.ppl.evidence.scores import Scores
from verify.ppl.frozen import frozen_name
from verify.ppl.groups import GroupResult

_NO_LIMITS: dict[str, Any] = {"theta_mean": None, "theta_sd": None, "theta_limits": None, "candidates": []}


def noise_json(
    arms: Sequence[Arm], pairs: Sequence[PairSummary], result: GroupResult, scores: Scores
) -> list[dict[str, Any]]:
    """One entry a baseline that has noise arms."""
    found = []
    for reference in (arm for arm in arms if arm.role == "baseline"):
        mine = [arm for arm in arms if arm.role == "noise" and arm.reference == reference.name]
        lines = [_arm(arm, reference, result, scores) for arm in mine]
        thetas = [line["theta"] for line in lines if line["theta"] is not None]
        if not mine:
            continue
        if len(thetas) < 2:
            # Arms that failed are told of all the same.
            found.append({"reference": reference.name, "arms": lines, **_NO_LIMITS})
            continue
        mean, limits = float(np.mean(thetas)), prediction_interval(thetas)
        shifts = prediction_interval([line["dlnppl"] for line in lines if line["theta"] is not None])
        found.append(
            {
                "reference": reference.name,
                "arms": lines,
                "theta_mean": mean,
                "theta_sd": float(np.std(thetas, ddof=1)),
                "theta_limits": list(limits),
                "candidates": [
                    {
                        "candidate": pair.candidate.name,
                        "theta": pair.distance.theta,
                        "outside": not limits[0] <= pair.distance.theta <= limits[1],
                        "rank": sum(theta < pair.distance.theta for theta in thetas),
                        "dlnppl": pair.difference.mean,
                        "dlnppl_outside": not shifts[0] <= pair.difference.mean <= shifts[1],
                    }
                    for pair in pairs
                    if pair.reference is reference and pair.distance is not None
                ],
            }
        )
    return found


def noise_notes(found: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader of the verdict must know of the noise arms: plans with which the baseline is at fault."""
    return [
        f"the baseline's kernel with another plan, {arm['spec']}: {fault}"
        for entry in found
        for arm in entry["arms"]
        for fault in arm["faults"]
    ]


def prediction_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Where one more sample like these lies at CONFIDENCE: mean +/- t_{K-1} s sqrt(1 + 1/K), K >= 2."""
    k = len(samples)
    mean, spread = float(np.mean(samples)), float(np.std(samples, ddof=1))
    reach = float(special.stdtrit(k - 1, (1 + CONFIDENCE) / 2)) * spread * math.sqrt(1 + 1 / k)
    return mean - reach, mean + reach


def _arm(arm: Arm, reference: Arm, result: GroupResult, scores: Scores) -> dict[str, Any]:
    distance = distance_between(frozen_name(arm.name), frozen_name(reference.name), None, scores)
    top1, top1_reference = both(scores, arm.name, reference.name, "top1")
    return {
        "name": arm.name,
        "spec": arm.spec,
        "theta": distance.theta if distance else None,
        "distance_ratio": distance.ratio if distance else None,
        "distance_ratio_ci": [distance.low, distance.high] if distance else None,
        "dlnppl": difference_of(scores, arm.name, reference.name).mean,
        "kld_mean": scores.mean(arm.name, "kld_to_baseline"),
        "top1_changes": int((top1 != top1_reference).sum()),
        "faults": [
            *([f"{arm.name} failed: {result.findings[arm.name].failure}"] if arm.failed else []),
            *faults_in_place(result.layers, arm.name, arm.name),
        ],
    }
