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

from verify.diff.examining import CellInputs, KernelEvidence, smallest_squares
from verify.judge.strata import Judgement, Stratum, judge_strata
from verify.judge.verdict import Decision, PairEvidence, decide
from verify.kernels.bits import same_bits
from verify.kernels.judging.detectors import SUSPICIONS
from verify.kernels.judging.families import FAMILIES
from verify.kernels.judging.figures import (
    shared_fault,
    shared_overflow,
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
    covered: bool  # its launch trace differs from the baseline's
    bitwise_equal: bool  # both outputs
    same_spec: bool  # both are of one specification
    # Errors of both by row and head, where neither has a fault and logits are distinct: equal logits are
    # rounded alike, and their errors add up.
    stratum: Stratum | None
    # A fault that both have, bit for bit the same.
    shared: str = ""


def compare(inputs: CellInputs, baseline: KernelEvidence, candidate: KernelEvidence) -> Cell:
    """A candidate's cell."""
    faults = [*faults_of(candidate, "candidate"), *faults_of(baseline, f"baseline {baseline.spec}")]
    a, b = candidate.output, baseline.output
    equal = a is not None and b is not None and same_bits(a.out, b.out)
    shared = ""
    both_have = faults_of(baseline, "both")
    if both_have and (equal or candidate.probes_failed == baseline.probes_failed != []):
        # What both have to the bit is not the candidate's doing.
        shared, faults = shared_fault(both_have), []
    elif overflows_nowhere_else(candidate, baseline):
        assert candidate.measures is not None and baseline.measures is not None
        shared, faults = shared_overflow(candidate.measures.nonfinite, baseline.measures.nonfinite), []
    family = FAMILIES.get(inputs.family)
    comparable = not faults and not shared and (family is None or family.distinct)
    comparable = comparable and candidate.exact is not None
    return Cell(
        inputs=inputs,
        baseline=baseline,
        candidate=candidate,
        faults=faults,
        compared=a is not None and b is not None,
        covered=bool(candidate.trace.differs_from(baseline.trace)),
        bitwise_equal=equal,
        same_spec=candidate.spec == baseline.spec,
        stratum=_stratum(inputs, baseline, candidate) if comparable else None,
        shared=shared,
    )


def overflows_nowhere_else(candidate: KernelEvidence, baseline: KernelEvidence) -> bool:
    """Whether all that is wrong with a candidate are elements that are NaN or Inf in its baseline too."""
    a, b, measured = candidate.output, baseline.output, candidate.measures
    if (
        a is None
        or b is None
        or measured is None
        or not measured.nonfinite
        or len(faults_of(candidate, "")) > 1
    ):
        return False
    return bool((torch.isfinite(a.out) | ~torch.isfinite(b.out)).all())


def _stratum(inputs: CellInputs, baseline: KernelEvidence, candidate: KernelEvidence) -> Stratum:
    """Both kernels' errors on the rows that are of the cell's length."""
    call, exact = inputs.call, candidate.exact
    assert exact is not None
    # A cache that both have is no change; one that only one has is charged to it.
    name = "energy" if candidate.cache == baseline.cache else "given_energy"
    # What the finer of both types cannot show: `out=f32`, written out, asks about the coarser one.
    out = max(candidate.result_type, baseline.result_type, key=lambda x: FLOAT_TYPES[x].digits)
    rows = torch.ones_like(call.kv_len, dtype=torch.bool)
    if inputs.family in FAMILIES and call.path == "decode":
        rows = call.kv_len == inputs.n_kv
    chosen = rows.flatten().cpu().numpy()
    per_row = (smallest_squares(exact, out), exact.square().mean(-1))
    floor, power = (x.flatten(0, 1).cpu().numpy()[chosen] for x in per_row)
    return Stratum(
        shape=inputs.shape,
        n_kv=inputs.n_kv,
        family=inputs.family,
        candidate=getattr(candidate, name)[chosen],
        reference=getattr(baseline, name)[chosen],
        floor=floor,
        power=power,
        heads=tuple(range(call.shape.q_heads)),
        a_kv_head=call.shape.ratio,
    )


def judge_cells(cells: Sequence[Cell], margin: float) -> Judgement:
    """The strata of one candidate's cells in which another plan ran: draws of a kind of input are one."""
    kinds: dict[tuple[str, int, str], list[Stratum]] = {}
    for cell in cells:
        if cell.stratum is not None and cell.covered and len(cell.stratum.candidate):
            s = cell.stratum
            kinds.setdefault((s.shape, s.n_kv, s.family), []).append(s)
    return judge_strata([joined(of_kind) for of_kind in kinds.values()], margin)


def joined(draws: Sequence[Stratum]) -> Stratum:
    """Draws of one kind of input as one stratum."""
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(d, name) for d in draws])
        for name in ("candidate", "reference", "floor", "power")
    }
    return replace(draws[0], **arrays)


def decide_cells(
    cells: Sequence[Cell], judgement: Judgement, *, margin: float, allow_same: bool, narrowed_by: str
) -> Decision:
    """The verdict on one candidate over some cells, whose strata are judged among all.

    Cells in which the plan did not differ, and probes, count only where they are broken.
    """
    faults = [(c.candidate.severity, fault) for c in cells for fault in c.faults]
    faults.sort(key=lambda x: -x[0])
    compared = [c for c in cells if c.compared]
    covered = [c for c in compared if c.covered]
    return decide(
        PairEvidence(
            faults=[fault for _, fault in faults[:1]],
            same_spec=all(c.same_spec for c in cells),
            coverage=len(covered) / max(len(compared), 1),
            bitwise_equal=bool(compared) and all(c.bitwise_equal for c in covered or compared),
            not_compared="" if compared else "probes show faults alone: none was found, and none is compared",
            distance=None,
            margin=margin,
            unit="cells",
            reference="baseline",
            narrowed_by=narrowed_by,
            allow_same=allow_same,
            strata=judgement,
        )
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
    return faults


def suspicions(found: KernelEvidence) -> list[str]:
    """What is odd without being a fault."""
    return [finding.said for finding in found.findings if finding.detector in SUSPICIONS]
