"""What a kernel diff found about each candidate, and as `run.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from verify.arms.alone import TimeShare
from verify.diff.cells import Cell, alone_family, evidence_of, strata_of, suspicions
from verify.diff.inputs import DEFAULT_ROWS, FEW_ROWS, DiffSettings, families_of
from verify.diff.stored_strata import StoredPair
from verify.judge.strata import Judgement, StratumResult
from verify.judge.verdict import EXIT_CODES, Decision, PairEvidence, Verdict, decide
from verify.kernels.trace import LaunchTrace
from verify.machine import environment
from verify.machine.command_line import command_line

# 2: `gain` is that of `verify ppl` and `gen`, over all rows, unweighted. 3: `pairs[].strata`.
SCHEMA = 3
# Decades a bin of `cells[].elements`, and the first and the last bin.
BIN, _BINS = 0.25, (-48, 24)

# Settings that the command line leaves out where they are as always.
_WITH_DEFAULT = (
    *("path", "seeds", "first_seed", "rows", "most_rows", "n_q", "sequences", "dtype", "margin"),
    *("allow_same", "strict", "headroom"),
)


class LengthLine(NamedTuple):
    """The cells of one shape and length: a line of the report. strata: those of its own."""

    cells: list[Cell]
    decision: Decision
    strata: Judgement


@dataclass
class CandidateResult:
    """One candidate over all cells."""

    spec: str  # of the candidate
    baseline: str  # specification that it was compared with
    verdict: Verdict  # on this candidate
    reasons: list[str]  # for it, sentences
    cells: list[Cell]  # in the order they ran
    lines: list[LengthLine]  # by shape and length
    strata: Judgement  # what the kinds of input say
    trace: LaunchTrace  # what it launched
    alone: Judgement | None = None  # of single tokens; None: it was asked none
    looks: int = 1  # that a kind of input may be given
    evidence: PairEvidence | None = None  # what decided, None where it takes none of the inputs
    looks_like: Sequence[str] = ()  # of a broken one: known bugs that it is most like, sentences

    def stored(self) -> StoredPair | None:
        """What can be judged again; None where nothing was compared."""
        if self.evidence is None:
            return None
        alone = strata_of(self.cells, self.looks, alone=True) if self.alone is not None else None
        strata = strata_of(self.cells, self.looks)
        return StoredPair(
            spec=self.spec,
            verdict=self.verdict,
            reasons=self.reasons,
            evidence=self.evidence,
            strata=strata,
            alone=alone,
        )

    @property
    def worst(self) -> Cell | None:
        """The cell to look at first: of faults the gravest by whatever detector fired, of losses the one of
        the stratum that tells, else the largest error beside its budget."""
        faulty = [c for c in self.cells if c.faults]
        if faulty:
            return max(faulty, key=lambda c: c.candidate.severity)
        compared = [c for c in self.cells if c.compared]
        telling = self.strata.telling
        if telling is not None and self.verdict in ("degraded", "inconclusive"):
            compared = [c for c in compared if _is_of(c, telling)] or compared
        if not any(c.candidate.severity for c in compared):
            # No budget says anything: the error beside the result does.
            return max(compared, key=lambda c: c.candidate.nmse, default=None)
        return max(compared, key=lambda c: c.candidate.severity, default=None)


@dataclass
class DiffOutcome:
    """All that a kernel diff found."""

    settings: DiffSettings  # of the diff
    candidates: list[CandidateResult]  # one a candidate
    verdict: Verdict  # the gravest
    exit_code: int  # of the verdict
    notes: list[str]  # what a reader must know
    run: dict[str, Any]  # content of run.json
    seconds: str  # where the time went, one line
    stopped: str = ""  # why the cells end before their time, or nothing
    interrupted: bool = False  # by the user


def _is_of(cell: Cell, stratum: StratumResult, family: str = "") -> bool:
    i = cell.inputs
    return (i.shape, i.n_kv, family or i.family) == (stratum.shape, stratum.n_kv, stratum.family)


def alone_sentence(spec: str, cells: Sequence[Cell], share: TimeShare) -> str | None:
    """What single tokens of a candidate were asked, and showed; None where it is not asked any."""
    asked = [c.candidate.alone for c in cells if c.candidate.alone is not None and c.candidate.alone.calls]
    if not asked and not share.left_out:
        return None
    calls, other = (sum(getattr(one, name) for one in asked) for name in ("calls", "other_bits"))
    said = (
        f"{spec}: {calls} calls of one query token (T = 1, B = 1) in {len(asked)} cells,"
        f" {share.share:.1%} of the run's time; other bits than in calls of many tokens in {other}"
    )
    times = [one.against_many for one in asked if math.isfinite(one.against_many)]
    if times:
        said += f", rms error {min(times):.3g} to {max(times):.3g} times theirs"
    if share.left_out:
        said += f"; {share.left_out} more calls, of all kernels, were left out for their time"
    return said


def command_of(settings: DiffSettings, cell: Cell) -> str:
    """The command that makes this cell again, alone."""
    inputs: dict[str, Any] = {"captured_from": settings.captured_from}
    if settings.captured_from is None:
        i = cell.inputs
        inputs = {"shape": i.shape, "n_kv": i.n_kv, "inputs": i.family, "first_seed": i.seed}
        rows = FEW_ROWS if i.faults_alone else settings.rows
        inputs |= {"rows": rows} if rows != DEFAULT_ROWS else {}
        # This cell, and none that would follow it.
        inputs |= {"most_rows": rows} if not cell.faults else {}
        inputs |= {"dtype": settings.dtype} if settings.dtype != "f16" else {}
        inputs |= {"sequences": settings.sequences} if settings.sequences != 1 else {}
        inputs |= {"n_q": settings.n_q} if settings.n_q else {}
        inputs |= {"strict": True} if settings.strict else {}
    asked = {"device": settings.device, "path": settings.path, "baseline": cell.baseline.spec}
    return command_line(["diff"], {**inputs, **asked, "candidates": [cell.candidate.spec]})


def command_of_all(settings: DiffSettings) -> str:
    """The command that makes the whole diff again."""
    s = settings
    drawn: dict[str, Any] = {"captured_from": s.captured_from}
    if s.captured_from is None:
        drawn = {"shape": ",".join(s.shapes), "n_kv": ",".join(map(str, s.n_kvs))}
        every = families_of("all", s.path), families_of("all", s.path, hidden=True)
        drawn |= {} if s.families in every else {"inputs": ",".join(s.families)}
        drawn |= {"hidden_nan": True} if s.families == every[1] else {}
        drawn |= {"brief": ",".join(map(str, s.brief_n_kvs))} if s.brief_n_kvs else {}
    names = ("baseline", "candidates", "device", *_WITH_DEFAULT)
    defaults = {f.name: f.default for f in fields(DiffSettings) if f.name in _WITH_DEFAULT}
    return command_line(["diff"], {**drawn, **{name: getattr(s, name) for name in names}}, defaults=defaults)


def run_json(
    settings: DiffSettings,
    results: Sequence[CandidateResult],
    base_traces: Mapping[str, LaunchTrace],
    verdict: Verdict,
    notes: list[str],
    device: str,
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "command": "diff",
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict],
        "reasons": [f"{r.spec}: {reason}" for r in results for reason in r.reasons],
        "notes": notes,
        "settings": {
            "shapes": list(settings.shapes),
            "n_kv": list(settings.n_kvs),
            "long_n_kv": list(settings.long_n_kvs),
            "brief_n_kv": list(settings.brief_n_kvs),
            "families": list(settings.families),
            "baseline": settings.baseline,
            "candidates": list(settings.candidates),
            "path": settings.path,
            "seeds": settings.seeds,
            "first_seed": settings.first_seed,
            "margin": settings.margin,
            "captured_from": settings.captured_from,
            "rows": settings.rows,
            "looks": settings.looks,
            "dtype": settings.dtype,
            "allow_same": settings.allow_same,
            "sequences": settings.sequences,
            "n_q": settings.n_q,
        },
        "environment": environment.describe(device),
        "again": command_of_all(settings),
        "pairs": [
            {
                "reference": r.baseline,
                "candidate": r.spec,
                "path": settings.path,
                "verdict": r.verdict,
                "reasons": r.reasons,
                **_ratio_json(r.strata.telling),
                "strata": [_stratum_json(s) for s in r.strata.strata],
                "alone": [_stratum_json(s) for s in (r.alone.strata if r.alone is not None else ())],
                "bitwise_equal": all(c.bitwise_equal for c in r.cells if c.compared)
                and any(c.compared for c in r.cells),
                "looks_like": list(r.looks_like),
                "lines": summary_lines(r),
                "again": command_of(settings, r.worst) if r.worst is not None else None,
            }
            for r in results
        ],
        "coverage": [
            {"spec": spec, **line.to_json()}
            for spec, trace in [*base_traces.items(), *((r.spec, r.trace) for r in results)]
            for line in trace.coverage()
        ],
        "cells": [_cell_json(settings, r, c) for r in results for c in r.cells],
        "detectable": {r.spec: detectable(r.strata) for r in results},
    }


def detectable(strata: Judgement) -> float | None:
    """A ratio from here on would have been `degraded` in any stratum, nine times of ten. None: no strata."""
    return max((s.detectable for s in strata.strata), default=None)


def summary_lines(result: CandidateResult) -> list[dict[str, Any]]:
    """One row a shape and length, in the order they ran: the worst of each figure over the inputs."""
    return [_row(line) for line in result.lines]


def _row(line: LengthLine) -> dict[str, Any]:
    cells = [c.candidate for c in line.cells]
    worst = max(line.cells, key=lambda c: c.candidate.severity)
    # Where every budget is vacuous none says anything, and no inputs are the worst.
    measured = [c.measures for c in cells if c.measures is not None]
    says = worst.candidate.severity > 0 or not measured or any(m.vacuous < 1 for m in measured)
    return {
        "shape": worst.inputs.shape,
        "n_kv": worst.inputs.n_kv,
        "verdict": line.decision.verdict,
        "budget": worst.candidate.figure("budget") if says else math.nan,
        "budget_family": worst.inputs.family if says else "no budget says anything",
        "lse": _largest([c.figure("lse") for c in cells]),
        "rms": _largest([c.figure("rms") for c in cells]),
        "gain": _largest([abs(c.figure("gain")) for c in cells]),
        "nmse": _largest([c.nmse for c in cells]),
        "ratio": _ratio(line),
        "cells": len(cells),
        "covered": sum(c.covered for c in line.cells),
    }


def _ratio(line: LengthLine) -> str:
    """R of the stratum that tells, with its own limits; or that errors are equal."""
    telling = line.strata.telling
    if telling is None:
        return "-"
    if telling.word == "equal":
        return "equal"
    return f"{telling.ratio:.3g} ({telling.low:.3g} to {telling.high:.3g})"


def _largest(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return max(known) if known else math.nan


def _by_head(cell: Cell) -> dict[str, list[float]]:
    """Of each query head: largest |error| / budget, and rms error over the baseline's; what is known."""
    found: dict[str, list[float]] = {}
    if (heat := cell.candidate.heat).size:
        found["budget"] = [_short(x) for x in heat.max(0)]
    if (s := cell.stratum) is not None and len(s.candidate):
        with np.errstate(all="ignore"):
            found["ratio"] = [_short(x) for x in np.sqrt(s.candidate.sum(0) / s.reference.sum(0))]
    return found


def _elements(ratios: np.ndarray) -> dict[str, Any] | None:
    """How many checked elements have which |error| / budget; None where none has one above 0."""
    known = ratios[np.isfinite(ratios) & (ratios > 0)]
    if not known.size:
        return None
    bins = np.clip(np.floor(np.log10(known) / BIN).astype(int), *_BINS)
    first = int(bins.min())
    return {"first": first * BIN, "step": BIN, "counts": np.bincount(bins - first).tolist()}


def _short(x: float) -> float:
    """Of four digits: what a colour shows."""
    return float(f"{x:.4g}")


def _ratio_json(telling: StratumResult | None) -> dict[str, Any]:
    if telling is None:
        return {"distance_ratio": None, "distance_ratio_ci": None, "distance_of": None}
    return {
        "distance_ratio": telling.ratio,
        "distance_ratio_ci": [telling.low, telling.high],
        "distance_of": {"shape": telling.shape, "n_kv": telling.n_kv, "family": telling.family},
    }


def _stratum_json(s: StratumResult) -> dict[str, Any]:
    return {
        "shape": s.shape,
        "n_kv": s.n_kv,
        "family": s.family,
        "heads": s.heads,
        "samples": s.samples,
        "looks": s.look,
        "ratio": s.ratio,
        "ratio_ci": [s.low, s.high],
        "word": s.word,
        "times_to_decide": s.times,
        "detectable": s.detectable,
        "candidate_error": s.candidate_error,
        "baseline_error": s.reference_error,
    }


def _cell_json(settings: DiffSettings, result: CandidateResult, cell: Cell) -> dict[str, Any]:
    i = cell.inputs
    own = Judgement([s for s in result.strata.strata if _is_of(cell, s)], "equal", settings.margin)
    own = own.only(i.shape, i.n_kv)
    alone = None
    if result.alone is not None:
        mine = [s for s in result.alone.strata if _is_of(cell, s, alone_family(i.family))]
        alone = Judgement(mine, "equal", settings.margin).only(i.shape, i.n_kv)
    evidence = evidence_of(
        [cell], own, margin=settings.margin, allow_same=settings.allow_same, narrowed_by="", alone=alone
    )
    decision = decide(evidence)
    return {
        "spec": cell.candidate.spec,
        "shape": i.shape,
        "n_kv": i.n_kv,
        "family": i.family,
        "seed": i.seed,
        "verdict": decision.verdict,
        "distance_ratio": _ratio_json(own.telling)["distance_ratio"],
        "faults": cell.faults,
        "suspicions": suspicions(cell.candidate),
        "covered": cell.covered,
        "bitwise_equal": cell.bitwise_equal,
        "again": command_of(settings, cell),
        "by_head": _by_head(cell),
        "elements": _elements(cell.candidate.ratios),
        **cell.candidate.to_json(),
        "baseline": cell.baseline.to_json(),
    }
