"""What the verdicts on a run's pairs amount to: the run's own verdict, its exit code, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from verify.judge.verdict import EXIT_CODES, Decision, overall
from verify.machine.exits import EXIT_VOID

VOID = "void"


class RunVerdict(NamedTuple):
    """verdict: the gravest of the pairs, or `void` where nothing was measured."""

    verdict: str
    exit_code: int
    reasons: list[str]


def run_verdict(pairs: Sequence[tuple[str, Decision]], void: Sequence[str]) -> RunVerdict:
    """The verdict of a run. pairs: what each candidate is called, and the decision on it; void: why the run
    measured nothing, if it did not.

    Reasons are those of the pairs that have the run's verdict; of several pairs, they name the candidate.
    """
    if void:
        return RunVerdict(VOID, EXIT_VOID, list(void))
    verdict = overall([decision for _, decision in pairs])
    several = len(pairs) > 1
    reasons = [
        f"{called}: {reason}" if several else reason
        for called, decision in pairs
        if decision.verdict == verdict
        for reason in decision.reasons
    ]
    return RunVerdict(verdict, EXIT_CODES[verdict], reasons)
