"""`verify selftest`: the mutation score of this machine's detectors, and what the gates of others see."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from verify.commands import options

if TYPE_CHECKING:
    from rich.table import Table

    from verify.selftest import SelftestResult, SelftestSubject


def command(
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="seeds to draw inputs with")] = 2,
    device: options.Device = None,
    json_: options.Json = False,
) -> int:
    """Run the command. Exit 0 if every fault is caught with every seed and no clean variant is, else 1."""
    from rich.console import Console
    from rich.markup import escape

    from verify.machine.devices import chosen_device, default_device
    from verify.machine.environment import prepare_torch
    from verify.machine.jsontext import to_json_text
    from verify.machine.terminal import console_on, print_table_on
    from verify.selftest import run_selftest

    prepare_torch()
    chosen = str(chosen_device(device or default_device()))
    out = sys.stderr if json_ else sys.stdout
    console = console_on(out)
    stderr = Console(stderr=True)
    with stderr.status("selftest") as status:

        def progress(text: str) -> None:
            if stderr.is_terminal:
                status.update(escape(text))
            else:
                print(f"  {text}", file=sys.stderr, flush=True)

        result = run_selftest(seeds, device=chosen, progress=progress)
    print_table_on(console, _table(result, "fault"))
    print_table_on(console, _table(result, "clean"))
    for line in _summary(result):
        console.print(line, soft_wrap=True)
    if json_:
        print(to_json_text(result.to_json()), end="")
    return result.exit_code


def _table(result: SelftestResult, kind: str) -> Table:
    from rich.table import Table

    from verify.kernels.judging.detectors import DETECTORS
    from verify.kernels.judging.gates import GATES

    title = {"fault": "known faults", "clean": "clean variants: nothing but ? may stand here"}[kind]
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="bold")
    table.add_column("", no_wrap=True)
    short = {"quadrature": "quadr.", "determinism": "determ."}
    for detector in DETECTORS:
        table.add_column(short.get(detector, detector), justify="center")
    table.add_column("|", justify="center")
    for gate in GATES:
        table.add_column(gate.name, justify="center")
    for subject in result.subjects:
        if subject.kind == kind:
            table.add_row(*_row(result, subject))
    return table


def _row(result: SelftestResult, subject: SelftestSubject) -> list[str]:
    from verify.kernels.judging.detectors import DETECTORS, SUSPICIONS
    from verify.kernels.judging.gates import GATES

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


def _summary(result: SelftestResult) -> list[str]:
    from verify.kernels.judging.gates import GATES

    faults, clean = len(result.faults), sum(s.kind == "clean" for s in result.subjects)
    lines = [
        "",
        f"mutation score: {faults - len(result.missed)} of {faults} faults caught with every seed"
        f" ({result.score:.1%}), {result.seeds} seeds, {result.seconds:.0f} s",
    ]
    missed = result.missed_unstated
    lines.append(
        f"  of a kernel that states no arithmetic, as py: by default: {faults - len(missed)} of {faults}"
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
