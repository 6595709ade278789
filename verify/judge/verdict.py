"""Verdicts: what the evidence about one pair of arms amounts to, and in which order the rules apply.

    broken        a budget was exceeded, NaN or Inf appeared, the kernel failed            exit 1
    inconclusive  the path under test did not run, or both specifications are the same     exit 3
    degraded      significantly farther from exact than the reference, beyond the margin   exit 1
    inconclusive  too little data for the margin                                           exit 3
    improved      significantly closer, beyond 1/1.10                                      exit 0
    round-off     differs, within budget, distance ratio inside the margin                 exit 0
    identical     every bit equal, though another plan or kernel ran                       exit 0

The first that applies, from the top. Two numbers decide about distance: the margin M (`--margin`) about harm,
1/1.10 (1/M where M is nearer to 1) about `improved`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from verify.judge.regimes import sentence
from verify.judge.statistics import DistanceRatio
from verify.judge.strata import FEWEST_SAMPLES, IMPROVEMENT, Judgement, StratumResult, improvement_of
from verify.machine.errors import UsageError

Verdict = Literal["broken", "inconclusive", "identical", "degraded", "improved", "round-off"]
# Of several pairs, the one that a reader must not miss gives the run its verdict.
GRAVITY: tuple[Verdict, ...] = (
    "broken",
    "degraded",
    "inconclusive",
    "round-off",
    "improved",
    "identical",
)
EXIT_CODES: dict[Verdict, int] = {
    "broken": 1,
    "inconclusive": 3,
    "identical": 0,
    "degraded": 1,
    "improved": 0,
    "round-off": 0,
}
DEFAULT_MARGIN = 1.25


def check_margin(margin: float) -> None:
    """Raises UsageError unless it is a ratio above 1."""
    if not 1 < margin < math.inf:
        raise UsageError(f"--margin {margin:g}: expected a ratio above 1")


@dataclass(frozen=True)
class PairEvidence:
    """Everything that decides about one candidate."""

    faults: Sequence[str]  # failures, budget breaches and non-finite values, sentences
    same_spec: bool  # both are of one specification
    coverage: float  # share of `unit` whose plan or kernel differed from the reference's
    bitwise_equal: bool  # attention outputs of every layer, and logits
    distance: DistanceRatio | None  # None where there are no finite divergences
    min_coverage: float = 0.0  # that is asked for
    margin: float = DEFAULT_MARGIN  # distance ratio that still is round-off
    not_compared: str = ""  # why there is nothing to compare the two by, if there is not
    unit: str = "scored tokens"  # what coverage is a share of
    reference: str = "reference"  # whose distance the ratio is to
    narrowed_by: str = "more windows (--chunks) narrow it"  # what makes an interval narrower
    # Mean divergences to exact in nats a token, of candidate and reference, where known.
    frozen_kld: tuple[float, float] | None = None
    allow_same: bool = False  # two equal specifications were asked for
    strata: Judgement | None = None  # what the kinds of input say, in the place of one distance
    unsteady: str = ""  # that what it does running freely is not explained, a sentence
    alone: Judgement | None = None  # what single tokens say, of kernels that are asked them
    ran: str = ""  # what coverage does not say of itself, ends a sentence
    through: str = "another plan"  # what the candidate went through that the reference did not


class Decision(NamedTuple):
    """A verdict and the reasons for it, sentences."""

    verdict: Verdict
    reasons: list[str]


def decide(e: PairEvidence) -> Decision:
    """The verdict on one pair."""
    if e.faults:
        return Decision("broken", list(e.faults))
    if e.not_compared:
        return Decision("inconclusive", [e.not_compared])
    if e.same_spec and not e.allow_same:
        return Decision(
            "inconclusive",
            ["candidate and baseline are the same specification, so nothing was compared"
             " (--allow-same where that is meant)"],
        )  # fmt: skip
    if not e.same_spec and (e.coverage == 0 or e.coverage < e.min_coverage):
        if e.coverage == 0:
            return Decision(
                "inconclusive",
                ["the path under test did not run: at every n_kv the candidate launched what the baseline"
                 " launched"],
            )  # fmt: skip
        return Decision(
            "inconclusive",
            [f"{e.coverage:.1%} of the {e.unit} went through the changed plan,"
             f" --min-coverage asks for {e.min_coverage:.1%}"],
        )  # fmt: skip
    decision = _with_single_tokens(e, _by_what_was_measured(e))
    if e.unsteady and decision.verdict != "degraded":
        return Decision("inconclusive", [e.unsteady, *decision.reasons])
    return decision


def _by_what_was_measured(e: PairEvidence) -> Decision:
    if e.bitwise_equal:
        if e.same_spec:
            return Decision("identical", ["every bit is equal; the two specifications are the same text"])
        return Decision(
            "identical",
            [f"every bit is equal, and {e.coverage:.1%} of the {e.unit} went through {e.through}{e.ran}"],
        )
    if e.strata is not None:
        return _by_strata(e, e.strata)
    if e.distance is None:
        return Decision("inconclusive", ["there is no scored token to measure a distance on"])
    return _by_distance(e, e.distance)


def hints_of_harm(alone: Judgement | None, margin: float) -> list[StratumResult]:
    """Strata of single tokens that lie beyond the margin and cannot tell whether by chance."""
    return [] if alone is None else [s for s in alone.of("inconclusive") if s.ratio > margin]


def _with_single_tokens(e: PairEvidence, decision: Decision) -> Decision:
    """What single tokens add. Few are asked, so they decide about harm alone: where it is significant, and
    where many show it and cannot yet tell. They never improve a verdict, nor does what few cannot rule out
    take one away."""
    found = e.alone
    if found is None:
        return decision
    undecided = [s for s in hints_of_harm(found, e.margin) if s.samples >= FEWEST_SAMPLES]
    if found.word == "degraded":
        verdict: Verdict = "degraded"
    elif undecided and decision.verdict not in ("degraded", "inconclusive"):
        verdict = "inconclusive"
    else:
        return decision
    telling = found.telling if verdict == "degraded" else undecided[0]
    said = f"one query token a call: {sentence(found)}"
    if telling is not None and telling.measured:
        said += f"; rms error over the {e.reference}'s in {telling}"
    if verdict == "inconclusive" and e.unit != "cells":
        # A model's layers pass once: when a hint is seen, the tensors that made it are gone.
        said += "; verify diff asks single tokens until they tell"
    return Decision(verdict, [said, *decision.reasons])


def bounds_in_words(margin: float) -> str:
    """The two numbers that decide, as every report prints them."""
    better = f"1/{min(IMPROVEMENT, margin):g}"
    return f"harm up to {margin:g} is round-off, closer than {better} is improved"


def _by_distance(e: PairEvidence, d: DistanceRatio) -> Decision:
    kld, margin = e.frozen_kld, e.margin
    interval = f"99.9 % interval {d.low:.3g} to {d.high:.3g}"
    if math.isinf(d.high):
        interval = "too little data for an interval"
    said = f"distance to exact is {d.ratio:.3g} times the {e.reference}'s ({interval}"
    said += f"; {kld[0]:.2g} against {kld[1]:.2g} nats a token)" if kld is not None else ")"
    if d.few_tokens_hold_it:
        said += f", though mean divergences say {d.energy_ratio:.3g}: few tokens hold the difference"
    rule = f" ({bounds_in_words(margin)})"
    if d.low > margin:
        return Decision("degraded", [f"{said}: farther, beyond the margin of {margin:g}{rule}"])
    if d.high < improvement_of(margin):
        return Decision("improved", [f"{said}: closer, beyond 1/{min(IMPROVEMENT, margin):g}{rule}"])
    if d.high <= margin:
        real = ", a real difference" if d.low > 1 or d.high < 1 else ""
        return Decision("round-off", [f"{said}{real}: inside the margin of {margin:g}{rule}"])
    reach = "" if math.isinf(d.high) else f": it reaches the margin of {margin:g}"
    return Decision("inconclusive", [f"{said}{reach}{rule}; {e.narrowed_by}"])


def _by_strata(e: PairEvidence, found: Judgement) -> Decision:
    """The gravest of what is significant, in one sentence that names regimes, and the strata it rests on."""
    if not found.strata:
        return Decision(
            "inconclusive", ["no inputs with distinct logits were compared: there is no distance"]
        )
    words: dict[str, Verdict] = {
        "degraded": "degraded",
        "inconclusive": "inconclusive",
        "improved": "improved",
    }
    reasons = [sentence(found)]
    telling = found.telling
    if found.word != "equal" and telling is not None and telling.measured:
        reasons.append(
            f"rms error over the {e.reference}'s in {telling} (each limit its own, 99.9 %);"
            f" {bounds_in_words(e.margin)}"
        )
    if found.word == "inconclusive":
        undecided = found.of("inconclusive")
        named = "; ".join(str(s) for s in undecided[:3]) + ("; ..." if len(undecided) > 3 else "")
        reasons.append(f"undecided in {len(undecided)} of {len(found.strata)}: {named}; {e.narrowed_by}")
    return Decision(words.get(found.word, "round-off"), reasons)


def overall(decisions: Sequence[Decision]) -> Verdict:
    """The verdict of a run with several pairs: the first of GRAVITY that any pair has."""
    return min((d.verdict for d in decisions), key=GRAVITY.index)
