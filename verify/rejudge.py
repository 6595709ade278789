"""A finished run judged by today's rules, from what its folder holds: what each pair was called, and is.

Nothing is computed again but statistics: the tokens' divergences and nll, the errors by layer and head, and
of a diff those by row and head. What only the running kernels could show (that it failed, that it was
unsteady) stays as the run says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from verify.arms.alone import ONE_TOKEN, alone_name
from verify.arms.kernel_errors import faults_in_place
from verify.diff.stored_strata import StoredPair
from verify.gen.record import GenPairRecord, GenRun
from verify.judge.statistics import DistanceRatio
from verify.judge.verdict import GRAVITY, Decision, PairEvidence, Verdict, bounds_in_words, decide, overall
from verify.machine.errors import UsageError
from verify.ppl.evidence.alone import SingleTokensBeside
from verify.ppl.evidence.pairs import advice, both, distance_between, only_reference_exact
from verify.ppl.evidence.scores import Scores
from verify.ppl.evidence.steadiness import unexplained
from verify.ppl.record import ArmRecord, PairRecord, PplRun, frozen_name

# Words of a stored reason that no table can show again.
_OF_THE_RUN = (
    *("another result for the same call", "failed at", "does not take", "NaN or Inf in"),
    *("promises row_alone", "not this change"),
)


class Rejudged(NamedTuple):
    """One candidate: its specification, what it was called and why, and the decision by today's rules."""

    spec: str
    was: str
    reasons: Sequence[str]
    now: Decision

    @property
    def changed(self) -> bool:
        return self.was != self.now.verdict

    def __str__(self) -> str:
        said = f"{self.spec}: {self.now.verdict}: {'; '.join(self.now.reasons)}"
        if not self.changed:
            return f"{said} (as it was)"
        return f"{said}\n  it was {self.was}: {'; '.join(self.reasons)}"


def rejudge_ppl(
    run: PplRun, tokens: pa.Table | None, layers: pa.Table | None, alone: pa.Table | None = None
) -> list[Rejudged]:
    """Every pair of a run of `verify ppl`. alone: None where the run asked no single tokens.

    Raises UsageError where its other tables are gone.
    """
    if tokens is None or layers is None:
        raise UsageError(
            "--rejudge: the run has no tokens.parquet and layers.parquet, which are judged again"
        )
    scores = Scores(tokens, run.corpus.scored_per_window)
    arms = {arm.name: arm for arm in run.arms}
    floor = next((arm.name for arm in run.arms if arm.role == "floor"), None)
    return [
        _pair(run, pair, arms[pair.candidate], arms[pair.reference], scores, layers, alone, floor)
        for pair in run.pairs
    ]


def _pair(
    run: PplRun,
    pair: PairRecord,
    candidate: ArmRecord,
    reference: ArmRecord,
    scores: Scores,
    layers: pa.Table,
    alone: pa.Table | None,
    floor: str | None,
) -> Rejudged:
    names = frozen_name(pair.candidate), frozen_name(pair.reference)
    frozen_floor = frozen_name(floor) if floor else None
    klds = both(scores, *names, "kld_to_exact")
    distance = distance_between(*names, frozen_floor, scores)
    called = ((pair.candidate, "candidate"), (pair.reference, f"baseline {reference.spec}"))
    kept = [reason for reason in pair.reasons if any(words in reason for words in _OF_THE_RUN)]
    faults = [
        fault
        for arm, name in called
        for which, words in ((arm, name), (alone_name(arm), f"{name}, {ONE_TOKEN}"))
        for fault in faults_in_place(layers, which, words)
    ]
    found = unexplained(scores, pair.candidate, pair.reference, floor, run.free_noise)
    margin = float(run.settings.get("margin", 1.25))
    single_tokens = None
    if alone is not None:
        single_tokens = SingleTokensBeside(alone, pair.candidate, pair.reference, run.model.ratio)
    stand_in = bool(frozen_floor and only_reference_exact(*klds))
    now = decide(
        PairEvidence(
            faults=[*(kept if pair.verdict == "broken" else []), *faults],
            same_spec=(candidate.spec, candidate.calls) == (reference.spec, reference.calls),
            coverage=pair.coverage,
            bitwise_equal=pair.bitwise_equal,
            distance=distance,
            not_compared="; ".join(kept) if pair.verdict == "inconclusive" else "",
            min_coverage=float(run.settings.get("min_coverage", 0.0)),
            margin=margin,
            allow_same=bool(run.settings.get("allow_same", False)),
            frozen_kld=(pair.frozen_kld, pair.frozen_kld_reference),
            through=_through(candidate.calls, reference.calls),
            reference="floor" if stand_in else "reference",
            narrowed_by=advice(distance, len(klds[0]), margin),
            unsteady=str(found) if found is not None else "",
            alone=single_tokens.judge(margin) if single_tokens is not None else None,
        )
    )
    return Rejudged(candidate.spec, pair.verdict, pair.reasons, now)


def rejudge_gen(run: GenRun) -> list[Rejudged]:
    """Every pair of a run of `verify gen`, whose ratios stand as they are."""
    arms = {arm.name: arm for arm in run.arms}
    margin = float(run.settings.get("margin", 1.25))

    def again(pair: GenPairRecord) -> Rejudged:
        candidate, reference = arms[pair.candidate], arms[pair.reference]
        distance = None
        if pair.distance_ratio is not None and pair.distance_ratio_ci is not None:
            low, high = pair.distance_ratio_ci
            high = math.inf if high is None else high
            distance = DistanceRatio(pair.distance_ratio, low, high, math.nan, pair.distance_scope or "")
        now = decide(
            PairEvidence(
                faults=pair.reasons if pair.verdict == "broken" else [],
                same_spec=(candidate.spec, candidate.calls) == (reference.spec, reference.calls),
                coverage=pair.coverage,
                bitwise_equal=pair.bitwise_equal,
                distance=distance,
                margin=margin,
                allow_same=bool(run.settings.get("allow_same", False)),
                unit="tokens",
                through=_through(candidate.calls, reference.calls),
                narrowed_by="more tokens (-n) narrow it",
            )
        )
        return Rejudged(candidate.spec, pair.verdict, pair.reasons, now)

    return [again(pair) for pair in run.pairs]


def _through(calls: str, of_reference: str) -> str:
    """What a candidate's tokens went through that the reference's did not, in words."""
    return "another plan" if calls == of_reference else calls or "plain calls"


def rejudge_diff(stored: Sequence[StoredPair]) -> list[Rejudged]:
    """Every candidate of a run of `verify diff`, from the rows that it kept."""
    return [Rejudged(pair.spec, pair.verdict, pair.reasons, pair.judge()) for pair in stored]


def verdict_of(pairs: Sequence[Rejudged]) -> Verdict:
    """The gravest of the pairs by today's rules."""
    return overall([pair.now for pair in pairs]) if pairs else GRAVITY[-1]


def rules_in_words(margin: float) -> str:
    """By what a run is judged today."""
    return f"judged by today's rules (docs/evidence.md): {bounds_in_words(margin)}"
