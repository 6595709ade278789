"""The mutation score of this machine's detectors, as tables and sentences."""

from __future__ import annotations

from typing import TextIO

from rich.table import Table

from verify.kernels.judging.detectors import DETECTORS, SUSPICIONS
from verify.kernels.judging.gates import GATES
from verify.machine.terminal import console_on, print_table_on
from verify.reports.tables import Column, table_of
from verify.selftest import SelftestResult, SelftestSubject


def print_result(result: SelftestResult, to: TextIO) -> None:
    """Faults, clean variants, and the scores."""
    console = console_on(to)
    print_table_on(console, _table(result, "fault"))
    print_table_on(console, _table(result, "clean"))
    for line in summary(result):
        console.print(line, soft_wrap=True)


def _table(result: SelftestResult, kind: str) -> Table:

    title = {"fault": "known faults", "clean": "clean variants: nothing but ? may stand here"}[kind]
    short = {"quadrature": "quadr.", "determinism": "determ."}
    marks = (*(short.get(name, name) for name in DETECTORS), "|", *(gate.name for gate in GATES))
    columns = [Column("", "word"), *(Column(name, "mark") for name in marks)]
    rows = [_row(result, subject) for subject in result.subjects if subject.kind == kind]
    return table_of(columns, rows, title=title)


def _row(result: SelftestResult, subject: SelftestSubject) -> list[str]:
    if subject.skipped:
        return [subject.name, subject.skipped]
    row = [subject.name]
    for detector in DETECTORS:
        count = subject.detectors[detector]
        mark = "?" if detector in SUSPICIONS else "x"
        row.append("" if not count else mark if count == result.seeds else f"{count}/{result.seeds}")
    row.append("|")
    for gate in GATES:
        # On Gaussian inputs, as their tests are; in brackets: only on other families.
        everywhere, gaussian = subject.gates_any[gate.name], subject.gates[gate.name]
        row.append("x" if gaussian == result.seeds else "(x)" if everywhere else "")
    return row


def summary(result: SelftestResult) -> list[str]:
    faults, clean = len(result.faults), sum(s.kind == "clean" for s in result.subjects)
    lines = [
        "",
        f"mutation score: {faults - len(result.missed)} of {faults} faults caught with every seed"
        f" ({result.score:.1%}), {result.seeds} seeds, {result.seconds:.0f} s",
    ]
    missed = result.missed_unstated
    read = [s.name for s in result.faults if s.read and s not in missed]
    lines.append(
        f"  of a kernel that states no arithmetic, as py: by default: {faults - len(missed)} of {faults}"
        + (f" (by what is read off it: {', '.join(read)})" if read else "")
        + (f"; not {', '.join(s.name for s in missed)}" if missed else "")
    )
    for gate in GATES:
        lines.append(
            f"  {gate.name} ({gate.rule}): {result.gate_score(gate.name)} on Gaussian inputs,"
            f" {result.gate_score(gate.name, everywhere=True)} on all families;"
            f" refuses {result.gate_false_alarms(gate.name)} of {clean} clean variants"
        )
    for subject in result.subjects:
        if subject.skipped:
            lines.append(f"not run: {subject.name}: {subject.skipped}")
    lines += [f"missed: {s.name}: caught with {s.caught} of {result.seeds} seeds" for s in result.missed]
    for subject in result.false_alarms:
        lines += [f"false alarm: {subject.name}: {said}" for said in subject.said.values()]
    for subject in result.false_alarms_unstated:
        for said in subject.unstated_said.values():
            lines.append(f"false alarm where no arithmetic is stated: {subject.name}: {said}")
    return lines
