"""Which kinds of input are looked at again, since what was drawn of them cannot decide.

Nothing here knows of time: the same seed draws the same inputs on a busy machine. What looks cost in error
rate is `verify.judge.strata`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

from verify.diff.cells import family_of
from verify.diff.inputs import DiffSettings, InputKind, Look
from verify.diff.results import CandidateResult
from verify.judge.strata import StratumResult
from verify.judge.verdict import hints_of_harm


def undecided(settings: DiffSettings, results: Sequence[CandidateResult]) -> list[Look]:
    """The kinds that are all that keeps a candidate from its verdict, or from a sure one, and have looks
    left."""
    found: dict[tuple[InputKind, int], Look] = {}
    for i, result in enumerate(results):
        made = looks_made(result)
        for s, alone in _open(result):
            kind = InputKind(s.shape, s.n_kv, family_of(s.family))
            look = made[kind] + 1
            if look > settings.looks:
                continue
            one = found.setdefault((kind, look), Look(kind, look, (), alone=False))
            candidates = tuple(dict.fromkeys((*one.candidates, i)))
            found[kind, look] = Look(kind, look, candidates, one.alone or alone)
    return list(found.values())


def looks_made(result: CandidateResult) -> dict[InputKind, int]:
    """Looks that a candidate's kinds of input have had."""
    made: dict[InputKind, int] = {}
    for cell in result.cells:
        kind = InputKind(cell.inputs.shape, cell.inputs.n_kv, cell.inputs.family)
        made[kind] = max(made.get(kind, 1), cell.inputs.look)
    return made


def _open(result: CandidateResult) -> list[tuple[StratumResult, bool]]:
    """Strata that more rows may decide, and whether they are of single tokens."""
    if result.verdict in ("broken", "degraded") or result.evidence is None or result.evidence.not_compared:
        return []
    rows = result.strata.of("inconclusive") if result.strata.word == "inconclusive" else []
    # Single tokens decide about harm alone: those that hint at it.
    hints = hints_of_harm(result.alone, result.evidence.margin)
    return [*((s, False) for s in rows), *((s, True) for s in hints)]


def looks_sentence(settings: DiffSettings, result: CandidateResult) -> str | None:
    """How often a candidate's kinds of input were looked at; None where once was enough."""
    again = [look for look in looks_made(result).values() if look > 1]
    if not again:
        return None
    most = max(s.samples for s in result.strata.strata)
    return (
        f"{result.spec}: {len(again)} kinds of input could not decide with {settings.rows} rows and were"
        f" drawn again, up to {max(again)} looks and {most} rows;"
        " limits hold over all looks together"
    )
