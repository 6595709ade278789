"""Verdicts: what the evidence about one pair of arms amounts to, and in which order the rules apply.

    broken        a budget was exceeded, NaN or Inf appeared, the kernel failed       exit 1
    inconclusive  the path under test did not run, or too little data                 exit 3
    identical     every bit equal, though another plan or kernel ran                  exit 0
    degraded      significantly farther from exact than the reference                 exit 1
    improved      significantly closer                                                exit 0
    round-off     differs, within budget, distance ratio inside the margin            exit 0

The first that applies, from the top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from verify.judge.statistics import DistanceRatio

Verdict = Literal["broken", "inconclusive", "identical", "degraded", "improved", "round-off"]
PRECEDENCE: tuple[Verdict, ...] = (
    "broken",
    "inconclusive",
    "identical",
    "degraded",
    "improved",
    "round-off",
)
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
# `degraded` and `improved` need the whole interval beyond this ratio.
SIGNIFICANT_RATIO = 1.10
DEFAULT_MARGIN = 1.25


@dataclass(frozen=True)
class PairEvidence:
    """Everything that decides about one candidate.

    faults: failures, budget breaches and non-finite values, each a sentence; coverage: share of scored tokens
    (or of a `unit`) whose plan or kernel differed from the reference's; bitwise_equal: attention outputs of
    every layer and logits; distance: None where there are no finite divergences; frozen_kld: mean divergences
    to exact in nats a token, of the candidate and of the reference, where they are known; not_compared: why
    there is nothing to compare the two by, if there is not; reference: whose distance the ratio is to;
    narrowed_by: what makes an interval narrower.
    """

    faults: Sequence[str]
    same_spec: bool
    coverage: float
    bitwise_equal: bool
    distance: DistanceRatio | None
    min_coverage: float = 0.0
    margin: float = DEFAULT_MARGIN
    not_compared: str = ""
    unit: str = "scored tokens"
    reference: str = "reference"
    narrowed_by: str = "more windows (--chunks) narrow it"
    frozen_kld: tuple[float, float] | None = None


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
    if e.bitwise_equal:
        if e.same_spec:
            return Decision("identical", ["every bit is equal; the two specifications are the same text"])
        return Decision(
            "identical",
            [f"every bit is equal, and {e.coverage:.1%} of the {e.unit} went through another plan"],
        )
    if e.distance is None:
        return Decision("inconclusive", ["there is no scored token to measure a distance on"])
    return _by_distance(e)


def _by_distance(e: PairEvidence) -> Decision:
    d, kld, margin, narrowed_by = e.distance, e.frozen_kld, e.margin, e.narrowed_by
    assert d is not None
    interval = f"99.9 % interval {d.low:.3g} to {d.high:.3g}"
    if math.isinf(d.high):
        interval = "too little data for an interval"
    said = f"distance to exact is {d.ratio:.3g} times the {e.reference}'s ({interval}"
    said += f"; {kld[0]:.2g} against {kld[1]:.2g} nats a token)" if kld is not None else ")"
    if d.low > SIGNIFICANT_RATIO:
        return Decision("degraded", [f"{said}: farther, beyond {SIGNIFICANT_RATIO:g}"])
    if d.high < 1 / SIGNIFICANT_RATIO:
        return Decision("improved", [f"{said}: closer, beyond 1/{SIGNIFICANT_RATIO:g}"])
    if d.high < margin:
        return Decision("round-off", [f"{said}: inside the margin of {margin:g}"])
    return Decision(
        "inconclusive",
        [f"{said}: it reaches the margin of {margin:g}; {narrowed_by}"],
    )


def overall(decisions: Sequence[Decision]) -> Verdict:
    """The verdict of a run with several pairs: the first of GRAVITY that any pair has."""
    return min((d.verdict for d in decisions), key=GRAVITY.index)
