"""What this run sees of planted faults (`power` of run.json), and could have seen (`detectable`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from verify.arms.kernel_errors import KernelErrors, kernel_errors, rows_of
from verify.judge.chances import normal_quantile
from verify.judge.statistics import CONFIDENCE, POWER, paired_difference
from verify.kernels.judging.figures import RMS_LIMIT
from verify.ppl.evidence.pairs import both, difference_of, distance_between
from verify.ppl.evidence.scores import Scores
from verify.ppl.groups import GroupResult
from verify.ppl.planted import PlantedFault
from verify.ppl.record import DetectableRecord, PairRecord, PlantedRecord, PowerRecord, frozen_name

DETECTORS = ("budget", "rms", "gain", "distance", "nll", "kld")
# Two correct attention paths of one engine, compared through llama-perplexity's 16-bit logits file, print
# divergences from -7.1e-5 to +6.7e-5 nats a token (a true one is never negative).
LOGITS_FILE_NATS = 7e-5


class FreeErrors(NamedTuple):
    """Standard errors of what a free-running comparison measures: differences of mean nll and of mean KLD to
    exact, candidate - reference."""

    nll: float
    kld: float


def free_errors(pair: PairRecord, scores: Scores) -> FreeErrors:
    kld = both(scores, pair.candidate, pair.reference, "kld_to_exact")
    return FreeErrors(pair.dlnppl_se, paired_difference(*kld).se if len(kld[0]) else math.nan)


def power_record(
    faults: Sequence[PlantedFault],
    pairs: Sequence[PairRecord],
    reference: str,
    result: GroupResult,
    scores: Scores,
    margin: float,
) -> PowerRecord | None:
    """Every planted fault, and by which detectors it was seen; None where none was planted.

    Whether the free-running nll and KLD would show it: against their errors in the first of `pairs`.
    """
    if not faults:
        return None
    free = next((free_errors(pair, scores) for pair in pairs if pair.reference == reference), None)
    free = free or FreeErrors(math.nan, math.nan)
    records = [_planted(fault, free, reference, result, scores, margin) for fault in faults]
    smallest = {
        detector: min(
            (x.size for x in records if x.kind == "scale" and x.size is not None and x.seen[detector]),
            default=None,
        )
        for detector in DETECTORS
    }
    return PowerRecord(reference=reference, faults=records, smallest=smallest)


def _planted(
    fault: PlantedFault,
    free: FreeErrors,
    reference: str,
    result: GroupResult,
    scores: Scores,
    margin: float,
) -> PlantedRecord:
    frozen = frozen_name(reference)
    distance = distance_between(fault.name, frozen, None, scores)
    difference = difference_of(scores, fault.name, frozen)
    errors = kernel_errors(rows_of(result.layers, fault.name))
    kld, kld_reference = (scores.mean(name, "kld_to_exact") for name in (fault.name, frozen))
    return PlantedRecord(
        name=fault.name,
        kind=fault.kind,
        size=None if math.isnan(fault.size) else fault.size,
        distance_ratio=distance.ratio if distance else None,
        distance_ratio_ci=(distance.low, distance.high) if distance else None,
        frozen_kld=kld,
        dnll=difference.mean,
        dnll_se=difference.se,
        max_budget_ratio=errors.max_budget_ratio if errors else None,
        rms_ratio=errors.rms_ratio if errors else None,
        gain=errors.gain if errors else None,
        seen={
            "budget": errors is not None and errors.max_budget_ratio > 1,
            "rms": errors is not None and errors.rms_ratio > RMS_LIMIT,
            "gain": errors is not None and abs(errors.gain) > errors.gain_limit,
            "distance": distance is not None and distance.low > margin,
            "nll": abs(difference.mean) > _critical() * free.nll,
            "kld": abs(kld - kld_reference) > _critical() * free.kld,
        },
    )


def detectable_record(pair: PairRecord, result: GroupResult, power: PowerRecord | None) -> DetectableRecord:
    """What this run would have seen of one candidate, by detector."""
    errors = kernel_errors(rows_of(result.layers, pair.candidate))
    dnll = (_critical() + normal_quantile(POWER)) * pair.dlnppl_se
    slope = _nll_slope(power)
    return DetectableRecord(
        distance_ratio=pair.detectable_distance_ratio,
        scale_by_gain=_scale_by_gain(errors),
        dnll=dnll,
        scale_by_nll=dnll / slope if slope else None,
        logits_file_nats=LOGITS_FILE_NATS,
    )


def _critical() -> float:
    return normal_quantile((1 + CONFIDENCE) / 2)


def _scale_by_gain(errors: KernelErrors | None) -> float | None:
    """The scale error that passes the gain's limit with probability POWER."""
    if errors is None or not math.isfinite(errors.gain_limit):
        return None
    return errors.gain_limit + normal_quantile(POWER) * errors.gain_se


def _nll_slope(power: PowerRecord | None) -> float:
    """The most that a scale error of 1 could change the mean nll of these tokens by; 0: nothing is known.

    With frozen casts a scale error moves the nll in proportion to its size, but each token its own way: over
    a few hundred tokens not even the sign of the mean is sure. So its interval's far end, of the size that
    is known best.
    """
    if power is None:
        return 0.0
    return min(
        (
            (abs(x.dnll) + _critical() * x.dnll_se) / x.size
            for x in power.faults
            if x.kind == "scale" and x.size and math.isfinite(x.dnll) and math.isfinite(x.dnll_se)
        ),
        default=0.0,
    )
