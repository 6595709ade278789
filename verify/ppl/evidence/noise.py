"""The candidate's place among the noise arms: `noise` of run.json."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from verify.arms.arm import Arm
from verify.arms.kernel_errors import faults_in_place
from verify.judge.chances import student_quantile
from verify.judge.statistics import CONFIDENCE
from verify.ppl.evidence.pairs import both, difference_of, distance_between
from verify.ppl.evidence.scores import Scores
from verify.ppl.groups import GroupResult
from verify.ppl.record import AmongNoise, NoiseArm, NoiseRecord, PairRecord, frozen_name


def noise_records(
    arms: Sequence[Arm], pairs: Sequence[PairRecord], result: GroupResult, scores: Scores
) -> list[NoiseRecord]:
    """One a baseline that has noise arms."""
    records = []
    for reference in (arm for arm in arms if arm.role == "baseline"):
        mine = [arm for arm in arms if arm.role == "noise" and arm.reference == reference.name]
        lines = [_noise_arm(arm, reference, result, scores) for arm in mine]
        # Arms that failed are told of all the same.
        finite = [line for line in lines if line.theta is not None]
        thetas = [line.theta for line in finite if line.theta is not None]
        if not mine:
            continue
        if len(thetas) < 2:
            records.append(NoiseRecord(reference=reference.name, arms=lines))
            continue
        limits, shifts = prediction_interval(thetas), prediction_interval([line.dlnppl for line in finite])
        records.append(
            NoiseRecord(
                reference=reference.name,
                arms=lines,
                theta_mean=float(np.mean(thetas)),
                theta_sd=float(np.std(thetas, ddof=1)),
                theta_limits=limits,
                candidates=[
                    AmongNoise(
                        candidate=pair.candidate,
                        theta=pair.theta,
                        outside=not limits[0] <= pair.theta <= limits[1],
                        rank=sum(theta < pair.theta for theta in thetas),
                        dlnppl=pair.dlnppl,
                        dlnppl_outside=not shifts[0] <= pair.dlnppl <= shifts[1],
                    )
                    for pair in pairs
                    if pair.reference == reference.name and pair.theta is not None
                ],
            )
        )
    return records


def noise_notes(records: Sequence[NoiseRecord]) -> list[str]:
    """What a reader of the verdict must know of the noise arms: plans with which the baseline is at fault."""
    return [
        f"the baseline's kernel with another plan, {arm.spec}: {fault}"
        for record in records
        for arm in record.arms
        for fault in arm.faults
    ]


def prediction_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Where one more sample like these lies at CONFIDENCE: mean +/- t_{K-1} s sqrt(1 + 1/K), K >= 2."""
    k = len(samples)
    mean, spread = float(np.mean(samples)), float(np.std(samples, ddof=1))
    reach = float(student_quantile((1 + CONFIDENCE) / 2, k - 1)) * spread * math.sqrt(1 + 1 / k)
    return mean - reach, mean + reach


def _noise_arm(arm: Arm, reference: Arm, result: GroupResult, scores: Scores) -> NoiseArm:
    distance = distance_between(frozen_name(arm.name), frozen_name(reference.name), None, scores)
    top1, top1_reference = both(scores, arm.name, reference.name, "top1")
    failure = result.findings[arm.name].failure
    return NoiseArm(
        name=arm.name,
        spec=arm.spec,
        theta=distance.theta if distance else None,
        distance_ratio=distance.ratio if distance else None,
        distance_ratio_ci=(distance.low, distance.high) if distance else None,
        dlnppl=difference_of(scores, arm.name, reference.name).mean,
        kld_mean=scores.mean(arm.name, "kld_to_baseline"),
        top1_changes=int((top1 != top1_reference).sum()),
        faults=[
            *([f"{arm.name} failed: {failure}"] if failure is not None else []),
            *faults_in_place(result.layers, arm.name, arm.name),
        ],
    )
