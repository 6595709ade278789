"""What `verify judge` found: on a screen, as cases, as JSON."""

from __future__ import annotations

from typing import Any, TextIO

from rich.table import Table

from verify.distrust.judging import Judged
from verify.machine.terminal import console_on, print_table_on
from verify.reports.ci import CheckedCase, state_of
from verify.reports.verdict_lines import print_verdict

SCHEMA = 1


def print_judged(judged: Judged, to: TextIO) -> None:
    """A line a path, a law and a check, and the outcome."""
    console = console_on(to)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("what", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("said", overflow="fold")
    for case in cases_of(judged):
        word = {"passed": "ok", "failed": "FAILED", "skipped": "not run", "warned": "look"}[case.state]
        table.add_row(f"{case.group}: {case.name}", word, case.said)
    print_table_on(console, table)
    if judged.seconds is not None:
        console.print(f"median of a call on fresh inputs: {judged.seconds * 1e3:.3g} ms", soft_wrap=True)
    print_verdict(judged.outcome, judged.reasons, to, judged.notes)


def cases_of(judged: Judged) -> list[CheckedCase]:
    """A case for each path, law and check."""
    cases = []
    for path, outcome in judged.report.outcomes.items():
        for result in outcome.candidates:
            state = state_of(result.verdict)
            # Too little to tell which of two is nearer is no fault of a kernel.
            state = "warned" if result.verdict == "inconclusive" else state
            cases.append(
                CheckedCase("inputs", path, state, f"{result.verdict}: {result.reasons[0]}",
                            "\n".join(result.reasons))
            )  # fmt: skip
    for r in judged.laws:
        law_state = {"holds": "passed", "broken": "failed", "not applicable": "skipped"}[r.state]
        cases.append(CheckedCase("law", r.law.name, law_state, r.reason))  # type: ignore[arg-type]
    for c in judged.checks:
        check_state = {"clear": "passed", "caught": "failed", "not run": "skipped"}[c.state]
        cases.append(CheckedCase("cheat", c.name, check_state, c.said, f"{c.what}\n{c.said}"))  # type: ignore[arg-type]
    return cases


def judged_json(judged: Judged, environment: dict[str, Any]) -> dict[str, Any]:
    """Everything, as `--json` prints it."""
    return {
        "schema": SCHEMA,
        "command": "judge",
        "spec": judged.spec,
        "verdict": judged.outcome,
        "exit_code": judged.exit_code,
        "reasons": judged.reasons,
        "notes": judged.notes,
        "environment": environment,
        "inputs": {path: outcome.verdict for path, outcome in judged.report.outcomes.items()},
        "laws": [
            {"name": r.law.name, "state": r.state, "examples": r.examples, "reason": r.reason}
            for r in judged.laws
        ],
        "checks": [{"name": c.name, "what": c.what, "state": c.state, "said": c.said} for c in judged.checks],
        "seconds": judged.seconds,
    }
