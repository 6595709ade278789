"""What `verify tolerance` prints."""

from __future__ import annotations

from typing import TextIO

from verify.identify.tolerance import Tolerances
from verify.kernels.judging.gates import GATES
from verify.reports.tables import print_table


def print_tolerances(found: Tolerances, to: TextIO) -> None:
    """Two tables: what a right kernel reaches, and what gates see."""
    print(f"{found.spec} at {found.shape}, {found.n_kv} keys; a draw is one query token", file=to)
    columns = ("inputs", "draws", "NMSE median", "99.9 %", "at most", "relative 99.9 %", "absolute 99.9 %",
               "at most", "cosine from")  # fmt: skip
    rows = [
        (
            each.family, str(each.draws), f"{each.typical:.2g}", f"{each.nmse:.2g}", f"{each.nmse_most:.2g}",
            f"{each.relative:.2g}", f"{each.absolute:.2g}", f"{each.absolute_most:.2g}", f"{each.cosine:.9f}",
        )
        for each in found.families
    ]  # fmt: skip
    print_table(columns, rows, to)
    print(
        "smallest common factor that each gate sees, and (-) whether it misses the last key dropped", file=to
    )
    gates = [gate.name for gate in GATES]
    lines = []
    for each in found.families:
        cells = [each.family]
        for gate in gates:
            factor = each.factors[gate]
            text = "refuses right" if gate in each.refuses else "blind" if factor is None else f"{factor:.1e}"
            cells.append(text + ("" if each.dropped[gate] else " (-)"))
        lines.append(tuple(cells))
    print_table(("inputs", *gates), lines, to)
    for note in found.notes:
        print(note, file=to)
