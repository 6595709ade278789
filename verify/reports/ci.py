"""What a run hands over to whoever runs it: JUnit XML, and GitHub's annotations and job summary.

A command says what it found as cases; here they become a file, lines that GitHub reads, or neither.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO
from xml.etree import ElementTree

from verify.kernels.said import visible
from verify.machine.errors import UsageError
from verify.machine.outfile import check_writable

if TYPE_CHECKING:
    from verify.laws.run import LawResult

# Wrong cells of a diff that are listed one by one: GitHub shows ten annotations of a step.
MOST_CELLS = 10
CaseState = Literal["passed", "failed", "skipped", "warned"]
FORMATS = ("text", "github")


class CheckedCase(NamedTuple):
    """One line of what was found. group: what it belongs to; said: why, empty where it passed; text: all of
    it, lines and all; seconds: that it took."""

    group: str
    name: str
    state: CaseState
    said: str = ""
    text: str = ""


def check_ci_options(format_: str, junit: Path | None) -> None:
    """Raises UsageError before anything is measured."""
    if format_ not in FORMATS:
        raise UsageError(f"--format {format_}: expected one of {', '.join(FORMATS)}")
    if junit is not None:
        check_writable("--junit", junit)


def state_of(verdict: str) -> CaseState:
    """A verdict as the state of a case: what is inconclusive fails, as its exit code does."""
    return "passed" if verdict in ("identical", "improved", "round-off") else "failed"


def hand_over(
    cases: Sequence[CheckedCase],
    title: str,
    format_: str,
    junit: Path | None,
    *,
    summary: str = "",
    file: Path | None = None,
) -> None:
    """Write JUnit XML, print annotations, append the job's summary: what was asked for.

    summary: Markdown for the job's page, by default a table of the cases; file: that annotations point at.
    Raises UsageError where a file cannot be written.
    """
    if junit is not None:
        try:
            write_junit_cases(cases, title, junit)
        except OSError as error:
            raise UsageError(f"--junit {junit}: cannot be written: {error.strerror or error}") from None
    if format_ == "github":
        annotate(cases, sys.stderr, file)
        page = os.environ.get("GITHUB_STEP_SUMMARY")
        if page:
            try:
                with Path(page).open("a", encoding="utf-8") as to:
                    to.write(summary or summary_of(cases, title))
            except OSError as error:
                raise UsageError(f"GITHUB_STEP_SUMMARY={page}: {error.strerror or error}") from None


def cases_of_run(run: Mapping[str, Any]) -> list[CheckedCase]:
    """A case for each pair of a run of ppl, gen or diff (its `run.json`); of a diff one for each length too,
    where something is wrong."""
    command, cases = str(run["command"]), []
    pairs = run.get("pairs") or []
    for pair in pairs:
        name = f"{pair['candidate']} against {pair['reference']} ({pair.get('path', '')})"
        reasons = pair.get("reasons") or run["reasons"]
        cases.append(
            CheckedCase(
                group=command,
                name=name,
                state=state_of(pair["verdict"]),
                said=f"{pair['verdict']}: {reasons[0]}" if reasons else pair["verdict"],
                text="\n".join([f"{pair['verdict']}: {name}", *reasons]),
            )
        )
    if not cases:
        said = "; ".join(run["reasons"])
        cases.append(CheckedCase(command, str(run["verdict"]), state_of(run["verdict"]), said))
    wrong = [c for c in run.get("cells") or [] if c["verdict"] in ("broken", "degraded")]
    for c in wrong[:MOST_CELLS]:
        where = f"{c['spec']}: {c['family']}, {c['shape']} at {c['n_kv']} keys"
        said = c["faults"][0] if c["faults"] else c["verdict"]
        cases.append(CheckedCase(f"{command}.cells", where, "failed", said, f"{said}\nagain: {c['again']}"))
    return cases


def cases_of_laws(results: Sequence[LawResult]) -> list[CheckedCase]:
    """A case for each law of props."""
    states: dict[str, CaseState] = {"holds": "passed", "broken": "failed", "not applicable": "skipped"}
    return [
        CheckedCase(
            group=f"law.{r.law.group}",
            name=r.law.name,
            state=states[r.state],
            said=r.reason,
            text="\n".join(filter(None, (r.law.statement, r.reason, str(r.case or "")))),
        )
        for r in results
    ]


def write_junit_cases(cases: Sequence[CheckedCase], title: str, path: Path) -> None:
    """JUnit XML: a test case a case; what failed is its failure."""
    counts = {state: sum(c.state == state for c in cases) for state in ("failed", "skipped")}
    suite = ElementTree.Element(
        "testsuite",
        name=visible(title),
        tests=str(len(cases)),
        failures=str(counts["failed"]),
        skipped=str(counts["skipped"]),
    )
    for c in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=visible(c.group), name=visible(c.name))
        if c.state == "failed":
            failure = ElementTree.SubElement(case, "failure", message=visible(c.said))
            failure.text = visible(c.text or c.said)
        elif c.state == "skipped":
            ElementTree.SubElement(case, "skipped", message=visible(c.said))
        elif c.state == "warned":
            ElementTree.SubElement(case, "system-out").text = visible(c.text or c.said)
    tree = ElementTree.ElementTree(suite)
    ElementTree.indent(tree)
    tree.write(path, encoding="utf-8", xml_declaration=True)


def annotate(cases: Sequence[CheckedCase], to: TextIO, file: Path | None = None) -> None:
    """A line a failure, and a warning, as GitHub's workflow commands are written."""
    where = f"file={_property(str(file))}," if file is not None else ""
    for c in cases:
        if c.state in ("failed", "warned"):
            kind = "error" if c.state == "failed" else "warning"
            title = _property(f"{c.group}: {c.name}")
            print(f"::{kind} {where}title={title}::{_message(c.text or c.said)}", file=to, flush=True)


def summary_of(cases: Sequence[CheckedCase], title: str) -> str:
    """A table of the cases in Markdown, those that failed first."""
    order = {"failed": 0, "warned": 1, "skipped": 2, "passed": 3}
    lines = [f"### {title}", "", "| what | | why |", "|---|---|---|"]
    for c in sorted(cases, key=lambda c: order[c.state]):
        said = " ".join(visible(c.said).split()).replace("|", "\\|")
        lines.append(f"| {c.group}: {c.name} | {c.state} | {said} |")
    return "\n".join(lines) + "\n\n"


def _message(text: str) -> str:
    """GitHub's escapes: of the whole."""
    return visible(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    """And of a property."""
    return _message(text).replace(":", "%3A").replace(",", "%2C")
