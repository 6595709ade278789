"""The laws of attention against one kernel: a table, what broke with the way to break it again, JUnit XML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO
from xml.etree import ElementTree

from rich.table import Table

from verify.laws.draws import LENGTHS
from verify.laws.run import LawResult
from verify.machine.command_line import command_line
from verify.machine.terminal import console_on, counted, print_table_on
from verify.reports.tables import Column, table_of


def print_results(results: Sequence[LawResult], spec: str, device: str, to: TextIO) -> None:
    """A row a law; then every law that broke, with its shrunk case as a command and as a test."""
    console = console_on(to)
    print_table_on(console, table(results))
    for result in results:
        if result.state == "broken":
            for line in failure_lines(result, spec, device):
                console.print(line, soft_wrap=True)
    console.print(f"\n{summary(results)}", soft_wrap=True)


def table(results: Sequence[LawResult]) -> Table:
    columns: list[Column | str] = [
        *(Column("law", "word"), Column("", "word")),
        *("examples", "tightest margin"),
        Column("what it says", "words"),
    ]
    rows = []
    for result in results:
        name, state = result.law.name, {"holds": "holds", "broken": "BROKEN"}.get(result.state, "n/a")
        if result.state == "not applicable":
            rows.append([name, state, "", "", f"not applicable: {result.reason}"])
        else:
            rows.append([name, state, str(result.examples), margin(result), _said(result)])
    return table_of(columns, rows)


def _said(result: LawResult) -> str:
    """The law; where it holds with a reservation, that too."""
    reserved = result.state == "holds" and result.reason
    return f"{result.law.statement} ({result.reason})" if reserved else result.law.statement


def margin(result: LawResult) -> str:
    """The tightest margin in units of the tolerance; laws of bits have none to spare."""
    if result.state == "broken":
        return ""
    return "exact" if result.margin == 0 else f"{result.margin:.2g} of 1"


def failure_lines(result: LawResult, spec: str, device: str) -> list[str]:
    """What was found, and the shrunk case as a command and as a pytest snippet."""
    law, case = result.law, result.case
    assert case is not None
    return [
        "",
        f"{law.name}: {law.statement}",
        f"  tolerance: {law.tolerance}",
        f"  found: {result.reason}",
        f"  again: {command(result, spec, device)}",
        "",
        *(f"    {line}" for line in snippet(result, spec, device)),
    ]


def command(result: LawResult, spec: str, device: str) -> str:
    """The command that tries the shrunk case alone."""
    assert result.case is not None
    asked = {"law": result.law.name, "device": device, "case": result.case.to_json()}
    return command_line(["props", spec], asked, defaults={"device": "cpu"})


def snippet(result: LawResult, spec: str, device: str) -> list[str]:
    """A test of the shrunk case."""
    where = "" if device == "cpu" else f", {device!r}"
    name = result.law.name.replace("-", "_")
    return [
        f"from verify.laws import LAWS, {type(result.case).__name__}, subject_of",
        "",
        f"def test_{name}() -> None:",
        f"    subject = subject_of({spec!r}{where})",
        f'    LAWS["{result.law.name}"].check(subject, {result.case})',
    ]


def summary(results: Sequence[LawResult]) -> str:
    states = [result.state for result in results]
    seconds, held = sum(result.seconds for result in results), states.count("holds")
    return (
        f"{counted(held, 'law')} hold{'s' if held == 1 else ''}, {states.count('broken')} broken,"
        f" {states.count('not applicable')} not applicable;"
        f" {counted(sum(result.examples for result in results), 'example')} in {seconds:.0f} s, rows"
        f" of at most {LENGTHS[-1]} keys"
    )


def to_json(
    results: Sequence[LawResult], spec: str, device: str, environment: dict[str, Any]
) -> dict[str, Any]:
    """Everything, as `--json` prints it."""
    return {
        "schema": 1,
        "command": "props",
        "spec": spec,
        "device": device,
        "exit_code": exit_code(results),
        "environment": environment,
        "laws": [
            {
                "name": r.law.name,
                "group": r.law.group,
                "statement": r.law.statement,
                "tolerance": r.law.tolerance,
                "state": r.state,
                "examples": r.examples,
                "margin": r.margin,
                "reason": r.reason,
                "case": r.case.to_json() if r.case else None,
                "again": command(r, spec, device) if r.case else None,
                "seconds": round(r.seconds, 3),
            }
            for r in results
        ],
    }


def exit_code(results: Sequence[LawResult]) -> int:
    """1 if a law is broken, 3 if none holds either (nothing was shown), else 0."""
    states = {result.state for result in results}
    return 1 if "broken" in states else 0 if "holds" in states else 3


def write_junit(results: Sequence[LawResult], spec: str, device: str, path: Path) -> None:
    """JUnit XML: a test case a law; what broke is its failure."""
    suite = ElementTree.Element(
        "testsuite",
        name=f"verify props {spec}",
        tests=str(len(results)),
        failures=str(sum(r.state == "broken" for r in results)),
        skipped=str(sum(r.state == "not applicable" for r in results)),
        time=f"{sum(r.seconds for r in results):.3f}",
    )
    for r in results:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"{spec}.{r.law.group}", name=r.law.name, time=f"{r.seconds:.3f}"
        )
        if r.state == "broken":
            failure = ElementTree.SubElement(case, "failure", message=r.reason)
            failure.text = "\n".join(failure_lines(r, spec, device))
        elif r.state == "not applicable":
            ElementTree.SubElement(case, "skipped", message=r.reason)
    tree = ElementTree.ElementTree(suite)
    ElementTree.indent(tree)
    tree.write(path, encoding="utf-8", xml_declaration=True)
