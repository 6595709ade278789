"""At which of the lengths that are asked briefly a pair computes as it does at no length asked in full.

What a kind of input shows at one length it shows at another only where the same is launched there: a plan
that begins to cut, or a kernel that is another one from some length on, is asked in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from verify.diff.cells import Cell
from verify.diff.inputs import DiffSettings
from verify.kernels.judging.families import FAMILIES
from verify.kernels.kernel import Kernel


def unlike_lengths(settings: DiffSettings, kernel: Kernel, cells: Sequence[Cell]) -> list[tuple[str, int]]:
    """Shapes and brief lengths of one candidate's cells where it, or its baseline, launched what it launched
    at no length of that shape that is asked in full, or rounds as it does at none of them. Empty where no
    length is asked in full."""
    at: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        if cell.inputs.family in FAMILIES and cell.compared:
            at.setdefault((cell.inputs.shape, cell.inputs.n_kv), []).append(cell)
    found = []
    # A few rows may be another call than many: of a length those, where there are any.
    at = {key: [c for c in of if not c.inputs.faults_alone] or of for key, of in at.items()}
    for (shape, n_kv), brief in at.items():
        full = [of for (s, n), of in at.items() if s == shape and n not in settings.brief_n_kvs]
        if n_kv not in settings.brief_n_kvs or not full:
            continue
        known = [(_launched(of), _arithmetic(kernel, of)) for of in full]
        launched, arithmetic = _launched(brief), _arithmetic(kernel, brief)
        alike = launched <= set().union(*(kinds for kinds, _ in known))
        if not alike or all(arithmetic != other for _, other in known):
            found.append((shape, n_kv))
    return found


def _launched(cells: Sequence[Cell]) -> set[Any]:
    """What either kernel launched for rows of the cells' length: where it cut is left aside, not whether; and
    how many tokens were asked."""
    return {
        (role, path, signature._replace(cuts=(), tokens=0), len(signature.cuts) > 2)
        for cell in cells
        for role, evidence in (("candidate", cell.candidate), ("baseline", cell.baseline))
        for path, n_kv, signature in evidence.trace.rows
        if n_kv == cell.inputs.n_kv
    }


def _arithmetic(kernel: Kernel, cells: Sequence[Cell]) -> Any:
    """How the candidate rounds there, as it states or was read."""
    found = kernel.arithmetic_of(cells[0].inputs.call)
    return replace(found, cuts_at=None, block=None, shared_up_to=0)
