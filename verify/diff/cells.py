"""One candidate beside its baseline in one cell of the kernel diff report, and what all cells decide.

The energies of a cell's errors are samples of the stratum that shape, length and family are. Cells are judged
together by the rules of `verdict`: faults first, then coverage by the launch traces, then the strata.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from verify.arms.alone import ONE_TOKEN, broken_promise
from verify.diff.examining import CellInputs, KernelEvidence, finite_of
from verify.judge.strata import Judgement, Stratum, judge_strata
from verify.judge.verdict import PairEvidence
from verify.kernels.bits import same_bits
from verify.kernels.judging.contract import hidden_sentence
from verify.kernels.judging.detectors import SUSPICIONS
from verify.kernels.judging.families import ALL_FAMILIES, FAMILIES
from verify.kernels.judging.figures import (
    shared_fault,
    shared_overflow,
    smallest_squares,
)
from verify.kernels.numbers import FLOAT_TYPES


@dataclass
class Cell:
    """One candidate in one cell."""

    inputs: CellInputs  # that both kernels got
    baseline: KernelEvidence  # its errors
    candidate: KernelEvidence  # its errors
    faults: list[str]  # what makes it broken, sentences
    compared: bool  # both gave an output; of a probe only what failed is known
    covered: bool  # the candidate ran its plans, and its launch trace differs from the baseline's
    bitwise_equal: bool  # both outputs
    same_spec: bool  # both are of one specification
    # Errors of both by row and head, where neither has a fault and logits are distinct: equal logits are
    # rounded alike, and their errors add up.
    stratum: Stratum | None
    stratum_alone: Stratum | None = None  # of single tokens, the same
    # A fault that both have, bit for bit the same.
    shared: str = ""


def compare(inputs: CellInputs, baseline: KernelEvidence, candidate: KernelEvidence) -> Cell:
    """A candidate's cell."""
    faults = [*faults_of(candidate, "candidate"), *faults_of(baseline, f"baseline {baseline.spec}")]
    a, b = candidate.output, baseline.output
    if a is not None and b is not None:
        equal = same_bits(a.out, b.out) and _alike_alone(candidate, baseline)
    else:
        equal = bool(candidate.bits) and _same_as_stored(candidate, baseline)
    shared = ""
    both_have = faults_of(baseline, "both")
    if both_have and (equal or candidate.probes_failed == baseline.probes_failed != []):
        # What both have to the bit is not the candidate's doing.
        shared, faults = shared_fault(both_have), []
    elif not inputs.said_only and overflows_nowhere_else(candidate, baseline):
        assert candidate.measures is not None and baseline.measures is not None
        shared, faults = shared_overflow(candidate.measures.nonfinite, baseline.measures.nonfinite), []
    family = ALL_FAMILIES.get(inputs.family)
    # Of a model's layers, or a kind of numbers; kinds of calls show faults alone, in a few rows.
    sampled = family is None or (family.name in FAMILIES and family.distinct and not inputs.faults_alone)
    comparable = not faults and not shared and sampled and candidate.exact is not None
    return Cell(
        inputs=inputs,
        baseline=baseline,
        candidate=candidate,
        faults=faults,
        compared=candidate.ran and baseline.ran,
        # Rows too short for the plan to matter may have run as planned, beside others that did not.
        covered=candidate.trace.ran_its_plans and bool(candidate.trace.differs_from(baseline.trace)),
        bitwise_equal=equal,
        same_spec=candidate.spec == baseline.spec,
        stratum=stratum_of(inputs, baseline, candidate) if comparable else None,
        stratum_alone=_stratum_alone(inputs, baseline, candidate) if comparable else None,
        shared=shared,
    )


def _alike_alone(candidate: KernelEvidence, baseline: KernelEvidence) -> bool:
    """Whether single tokens, where any were asked, have equal bits."""
    calls = max((one.alone.calls for one in (candidate, baseline) if one.alone is not None), default=0)
    mine, theirs = (one.rows_alone(calls) for one in (candidate, baseline))
    return not calls or (mine is not None and theirs is not None and same_bits(mine, theirs))


def _same_as_stored(candidate: KernelEvidence, baseline: KernelEvidence) -> bool:
    """The same of a baseline whose outputs are hashes."""
    mine, theirs = candidate.bits, baseline.bits
    if candidate.alone is None and baseline.alone is None:
        return mine == theirs
    alone = [one.alone.bits if one.alone is not None else one.bits_of_first for one in (candidate, baseline)]
    return mine == theirs and alone[0] == alone[1]


def overflows_nowhere_else(candidate: KernelEvidence, baseline: KernelEvidence) -> bool:
    """Whether all that is wrong with a candidate are elements that are NaN or Inf in its baseline too."""
    a, alone, theirs_finite = candidate.output, candidate.alone, finite_of(baseline)
    if a is None or theirs_finite is None or candidate.measures is None:
        return False
    if len(faults_of(candidate, "")) > 2:
        return False
    compared = [(candidate.measures, candidate.findings, a.out, theirs_finite)]
    if alone is not None and alone.out is not None and alone.measures is not None:
        theirs = baseline.rows_alone(alone.calls)
        if theirs is None:
            return False
        compared.append((alone.measures, alone.findings, alone.out, torch.isfinite(theirs)))
    elif alone is not None:
        return False
    for measured, found, mine, its in compared:
        faults = [f for f in found if f.detector not in SUSPICIONS]
        if len(faults) > bool(measured.nonfinite):
            return False
        if not bool((torch.isfinite(mine) | ~its.to(mine.device)).all()):
            return False
    return any(measured.nonfinite for measured, *_ in compared)


def stratum_of(inputs: CellInputs, baseline: KernelEvidence, candidate: KernelEvidence) -> Stratum:
    """Both kernels' errors on the rows that are of the cell's length."""
    name = _energy_name(baseline, candidate)
    energies = getattr(candidate, name), getattr(baseline, name)
    finite = finite_of(candidate), finite_of(baseline)
    return _stratum_of(inputs, baseline, candidate, inputs.family, energies, finite)


def _stratum_alone(inputs: CellInputs, baseline: KernelEvidence, candidate: KernelEvidence) -> Stratum | None:
    """The same of single tokens; None where none were asked."""
    calls = max((one.alone.calls for one in (candidate, baseline) if one.alone is not None), default=0)
    if not calls:
        return None
    name = _energy_name(baseline, candidate)
    mine, its = (getattr(one.alone or one, name)[:calls] for one in (candidate, baseline))
    if len(mine) < calls or len(its) < calls:
        return None
    rows = [one.rows_alone(calls) for one in (candidate, baseline)]
    finite = [None if x is None else torch.isfinite(x) for x in rows]
    return _stratum_of(inputs, baseline, candidate, alone_family(inputs.family), (mine, its), finite)


_ALONE = ", one query token"


def alone_family(family: str) -> str:
    """A family of inputs, asked one query token a call."""
    return family + _ALONE


def family_of(stratum_family: str) -> str:
    """The family whose inputs a stratum's are, those of single tokens too."""
    return stratum_family.removesuffix(_ALONE)


def _energy_name(baseline: KernelEvidence, candidate: KernelEvidence) -> str:
    """A cache that both have is no change; one that only one has is charged to it."""
    return "energy" if candidate.cache == baseline.cache else "given_energy"


def _stratum_of(
    inputs: CellInputs,
    baseline: KernelEvidence,
    candidate: KernelEvidence,
    family: str,
    energies: tuple[np.ndarray, np.ndarray],
    finite: Sequence[torch.Tensor | None],
) -> Stratum:
    """energies: of the first rows of both kernels, [rows, Hq]; finite: which of their elements are, [B, T,
    Hq, Dv], None where all are."""
    call, exact, count = inputs.call, candidate.exact, len(energies[0])
    assert exact is not None
    # What the finer of both types cannot show: `out=f32`, written out, asks about the coarser one.
    out = max(candidate.result_type, baseline.result_type, key=lambda x: FLOAT_TYPES[x].digits)
    rows = torch.ones_like(call.kv_len, dtype=torch.bool)
    if inputs.family in FAMILIES:
        # On the prefill path rows follow each other up to that length, in the sequences that have it.
        own = call.kv_len if call.path == "decode" else call.kv_len.amax(1, keepdim=True)
        rows = (own == inputs.n_kv).expand_as(rows)
    chosen = rows.flatten().cpu().numpy()[:count]
    mine, its = (_finite_rows(x, count) for x in finite)
    overflows = int((its & ~mine)[chosen].sum())
    # Where sums overflow there is no size of an error: it is said, and other rows tell that.
    chosen &= mine & its
    per_row = (smallest_squares(exact, out), exact.square().mean(-1))
    floor, power = (x.flatten(0, 1).cpu().numpy()[:count][chosen] for x in per_row)
    return Stratum(
        shape=inputs.shape,
        n_kv=inputs.n_kv,
        family=family,
        candidate=energies[0][chosen],
        reference=energies[1][chosen],
        floor=floor,
        power=power,
        heads=tuple(range(call.shape.q_heads)),
        a_kv_head=call.shape.ratio,
        look=inputs.look,
        overflows=overflows,
        typical=baseline.typical,
    )


def _finite_rows(finite: torch.Tensor | None, count: int) -> np.ndarray:
    """[count]: which of the first rows are finite in all heads and columns."""
    if finite is None:
        return np.ones(count, dtype=bool)
    return np.asarray(finite.flatten(2).all(-1).flatten().cpu().numpy()[:count])


def judge_cells(cells: Sequence[Cell], margin: float, looks: int = 1) -> Judgement:
    """The strata of one candidate's cells in which another plan ran: draws of a kind of input are one.

    looks: that a kind may be given.
    """
    return judge_strata(strata_of(cells, looks), margin)


def judge_alone(cells: Sequence[Cell], margin: float, looks: int = 1) -> Judgement | None:
    """The strata of single tokens of one candidate's cells; None where none were asked."""
    strata = strata_of(cells, looks, alone=True)
    return judge_strata(strata, margin) if strata else None


def strata_of(cells: Sequence[Cell], looks: int = 1, *, alone: bool = False) -> list[Stratum]:
    """A stratum a kind of input, over its draws; `alone`: those of single tokens."""
    kinds: dict[tuple[str, int, str], list[Stratum]] = {}
    for cell in cells:
        s = cell.stratum_alone if alone else cell.stratum
        if s is not None and cell.covered and (len(s.candidate) or s.overflows):
            kinds.setdefault((s.shape, s.n_kv, s.family), []).append(s)
    return [joined(of_kind, looks) for of_kind in kinds.values()]


def joined(draws: Sequence[Stratum], looks: int = 1) -> Stratum:
    """Draws of one kind of input as one stratum, which may be given so many looks."""
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(d, name) for d in draws])
        for name in ("candidate", "reference", "floor", "power")
    }
    first = sum(len(d.candidate) for d in draws if d.look == 1)
    look, overflows = max(d.look for d in draws), sum(d.overflows for d in draws)
    return replace(draws[0], look=look, looks=looks, first=first, overflows=overflows, **arrays)


def evidence_of(
    cells: Sequence[Cell],
    judgement: Judgement,
    *,
    margin: float,
    allow_same: bool,
    narrowed_by: str,
    alone: Judgement | None = None,
) -> PairEvidence:
    """What decides about one candidate over some cells, whose strata, and those of single tokens, are judged
    among all.

    Cells in which the plan did not differ, and probes, count only where they are broken.
    """
    faults = [(c.candidate.severity, fault) for c in cells for fault in c.faults]
    faults.sort(key=lambda x: -x[0])
    compared = [c for c in cells if c.compared]
    covered = [c for c in compared if c.covered]
    not_compared = "" if compared else "probes show faults alone: none was found, and none is compared"
    refused = [c.candidate.alone.refused for c in compared if c.candidate.alone is not None]
    if any(refused):
        not_compared = f"candidate takes no call of one query token (T = 1): {next(filter(None, refused))}"
    calls = sum(c.candidate.alone.calls for c in compared if c.candidate.alone is not None)
    return PairEvidence(
        faults=[fault for _, fault in faults[:1]],
        same_spec=all(c.same_spec for c in cells),
        coverage=len(covered) / max(len(compared), 1),
        bitwise_equal=bool(compared) and all(c.bitwise_equal for c in covered or compared),
        not_compared=not_compared,
        distance=None,
        margin=margin,
        unit="cells",
        reference="baseline",
        narrowed_by=narrowed_by,
        allow_same=allow_same,
        strata=judgement,
        alone=alone,
        ran=f", {calls} rows of them as one query token a call" if calls else "",
    )


def faults_of(found: KernelEvidence, called: str) -> list[str]:
    """What makes a kernel `broken` in a cell, as sentences that begin with `called`."""
    if found.failure is not None:
        return [f"{called} failed: {found.failure}"]
    if found.probes_failed:
        more = f" ({len(found.probes_failed)} probes failed)" if len(found.probes_failed) > 1 else ""
        return [f"{called}: {found.probes_failed[0]}{more}"]
    faults = []
    for finding in found.findings:
        if finding.detector in SUSPICIONS:
            continue
        where = ""
        if finding.detector == "budget":
            _, row, head, element = found.worst
            got, exact = found.worst_values
            where = f" at row {row}, head {head}, element {element}: {got:.9g}, exact {exact:.9g}"
        faults.append(f"{called}: {finding.said}{where}")
    if (alone := found.alone) is not None:
        if alone.failure is not None:
            faults.append(f"{called} failed: {alone.failure}, {ONE_TOKEN}")
        for finding in alone.findings:
            if finding.detector not in SUSPICIONS:
                faults.append(f"{called}, {ONE_TOKEN}: {finding.said}")
        faults += broken_promise(found.spec, called, alone.calls, alone.other_bits)
    return faults


def say_what_is_hidden(inputs: CellInputs, found: Sequence[KernelEvidence | None]) -> None:
    """Make what is wrong a finding of the contract, where a cell's inputs ask for no more (`said_only`)."""
    family = ALL_FAMILIES.get(inputs.family)
    if not inputs.said_only or family is None or family.unseen is None:
        return
    for one in found:
        if one is not None and (wrong := faults_of(one, "")):
            one.contract = hidden_sentence(one.spec, family.unseen, wrong[0])
            one.findings, one.measures = [], None


def limits_of(cells: Sequence[Cell]) -> list[str]:
    """What the candidate's sums cannot do on some inputs, as its arithmetic says: sentences, each once."""
    found: dict[str, None] = {}
    for cell in cells:
        alone = cell.candidate.alone
        asked = [*cell.candidate.findings, *(alone.findings if alone is not None else ())]
        limit = next((finding.said for finding in asked if finding.detector == "limit"), None)
        if limit is not None:
            where = f"{cell.inputs.family} at {cell.inputs.n_kv:,} keys"
            found.setdefault(f"{limit} ({where}): no fault, and no other kind of input is judged by it")
    return list(found)


def suspicions(found: KernelEvidence) -> list[str]:
    """What is odd without being a fault."""
    return [finding.said for finding in found.findings if finding.detector in SUSPICIONS]
