"""Which kinds of input are looked at again, since what was drawn of them cannot decide.

Nothing here knows of time: the same seed draws the same inputs on a busy machine. What looks cost in error
rate is `verify.judge.strata`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from verify.diff.inputs import DiffSettings, InputKind, Look
from verify.diff.results import CandidateResult


def undecided(settings: DiffSettings, results: Sequence[CandidateResult]) -> list[Look]:
    """The kinds that are all that keeps a candidate from its verdict, and have looks left."""
    found: dict[tuple[InputKind, int], dict[int, None]] = {}
    for i, result in enumerate(results):
        if not _waits_for_rows(result):
            continue
        for s in result.strata.of("inconclusive"):
            if s.look < settings.looks:
                found.setdefault((InputKind(s.shape, s.n_kv, s.family), s.look + 1), {})[i] = None
    return [Look(kind, look, tuple(candidates)) for (kind, look), candidates in found.items()]


def _waits_for_rows(result: CandidateResult) -> bool:
    if result.verdict != "inconclusive" or result.strata.word != "inconclusive":
        return False
    compared = [cell for cell in result.cells if cell.compared]
    # One that takes no single token is inconclusive whatever rows say.
    return not any(c.candidate.alone is not None and c.candidate.alone.refused for c in compared)


def looks_sentence(settings: DiffSettings, result: CandidateResult) -> str | None:
    """How often a candidate's kinds of input were looked at; None where once was enough."""
    again = [s for s in result.strata.strata if s.look > 1]
    if not again:
        return None
    kinds = {(s.shape, s.n_kv, s.family) for s in again}
    return (
        f"{result.spec}: {len(kinds)} kinds of input could not decide with {settings.rows} rows and were"
        f" drawn again, up to {max(s.look for s in again)} looks and {max(s.samples for s in again)} rows;"
        " limits hold over all looks together"
    )
