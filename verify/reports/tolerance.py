"""What `verify tolerance` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TextIO

from verify.identify.tolerance import FamilyTolerance
from verify.kernels.judging.gates import GATES
from verify.reports.tables import print_table


def tolerance_json(
    spec: str, shape: str, n_kv: int, found: Sequence[FamilyTolerance], notes: Sequence[str]
) -> dict[str, Any]:
    """As `docs/json-of-commands.md` lists it."""
    return {
        "schema": 1,
        "command": "tolerance",
        "exit_code": 0,
        "spec": spec,
        "shape": shape,
        "n_kv": n_kv,
        "families": [each.to_json() for each in found],
        "notes": list(notes),
    }


def print_tolerances(
    spec: str, shape: str, n_kv: int, found: Sequence[FamilyTolerance], notes: Sequence[str], to: TextIO
) -> None:
    """Two tables: what a right kernel reaches, and what gates see."""
    print(f"{spec} at {shape}, {n_kv} keys; a draw is one query token", file=to)
    columns = ("inputs", "draws", "NMSE median", "99.9 %", "at most", "relative 99.9 %", "absolute 99.9 %",
               "at most", "cosine from")  # fmt: skip
    rows = [
        (
            each.family, str(each.draws), f"{each.typical:.2g}", f"{each.nmse:.2g}", f"{each.nmse_most:.2g}",
            f"{each.relative:.2g}", f"{each.absolute:.2g}", f"{each.absolute_most:.2g}", f"{each.cosine:.9f}",
        )
        for each in found
    ]  # fmt: skip
    print_table(columns, rows, to)
    print(
        "smallest common factor that each gate sees, and (-) whether it misses the last key dropped", file=to
    )
    gates = [gate.name for gate in GATES]
    lines = []
    for each in found:
        cells = [each.family]
        for gate in gates:
            factor = each.factors[gate]
            text = "refuses right" if gate in each.refuses else "blind" if factor is None else f"{factor:.1e}"
            cells.append(text + ("" if each.dropped[gate] else " (-)"))
        lines.append(tuple(cells))
    print_table(("inputs", *gates), lines, to)
    for note in notes:
        print(note, file=to)
