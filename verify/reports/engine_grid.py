"""The operator test of `verify props --profile engine`: a row a group, every cell that broke, JUnit XML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO
from xml.etree import ElementTree

from verify.laws.engine_grid import LAW, GridCell
from verify.laws.run import LawResult
from verify.machine.command_line import command_line
from verify.machine.terminal import counted
from verify.reports.props import exit_code
from verify.reports.tables import print_table

Found = Sequence[tuple[GridCell, LawResult]]


def print_grid(found: Found, spec: str, device: str, to: TextIO) -> None:
    """The table, then what broke, a line and a command each."""
    print_table(("cells", "held", "broken", "n/a", "tightest margin"), _rows(found), to)
    reasons: dict[str, int] = {}
    for _, result in found:
        if result.state == "not applicable":
            reasons[result.reason] = reasons.get(result.reason, 0) + 1
    for reason, count in reasons.items():
        print(f"not applicable: {counted(count, 'cell')}: {reason}", file=to)
    for cell, result in found:
        if result.state == "broken":
            print(f"BROKEN {cell.name}: {result.reason}", file=to)
            print(f"  again: {again(cell, spec, device)}", file=to)
    broken = sum(result.state == "broken" for _, result in found)
    held = sum(result.state == "holds" for _, result in found)
    print(f"{spec}: {counted(held, 'cell')} of {len(found)} held within budget, {broken} broken", file=to)


def again(cell: GridCell, spec: str, device: str) -> str:
    """The command that tries a cell alone."""
    cache = cell.problem.cache
    own = f"{spec},cache={cache}" if cache else spec
    asked = {"law": LAW, "device": device, "case": cell.problem.to_json()}
    return command_line(["props", own], asked, defaults={"device": "cpu"})


def grid_json(found: Found, spec: str, device: str, environment: dict[str, Any]) -> dict[str, Any]:
    """Everything, as `--json` prints it."""
    return {
        "schema": 1,
        "command": "props",
        "profile": "engine",
        "spec": spec,
        "device": device,
        "exit_code": exit_code([result for _, result in found]),
        "environment": environment,
        "cells": [
            {
                "group": cell.group,
                "name": cell.name,
                "state": r.state,
                "margin": r.margin,
                "reason": r.reason,
                "again": again(cell, spec, device) if r.state == "broken" else None,
                "seconds": round(r.seconds, 3),
            }
            for cell, r in found
        ],
    }


def write_grid_junit(found: Found, spec: str, device: str, path: Path) -> None:
    """JUnit XML: a test case a cell."""
    suite = ElementTree.Element(
        "testsuite",
        name=f"verify props --profile engine {spec}",
        tests=str(len(found)),
        failures=str(sum(r.state == "broken" for _, r in found)),
        skipped=str(sum(r.state == "not applicable" for _, r in found)),
        time=f"{sum(r.seconds for _, r in found):.3f}",
    )
    for cell, r in found:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"{spec}.{cell.group}", name=cell.name, time=f"{r.seconds:.3f}"
        )
        if r.state == "broken":
            failure = ElementTree.SubElement(case, "failure", message=r.reason)
            failure.text = again(cell, spec, device)
        elif r.state == "not applicable":
            ElementTree.SubElement(case, "skipped", message=r.reason)
    tree = ElementTree.ElementTree(suite)
    ElementTree.indent(tree)
    tree.write(path, encoding="utf-8", xml_declaration=True)


def _rows(found: Found) -> list[list[str]]:
    rows = []
    for group in dict.fromkeys(cell.group for cell, _ in found):
        mine = [(cell, r) for cell, r in found if cell.group == group]
        held = [(r.margin, cell.name) for cell, r in mine if r.state == "holds"]
        tightest = max(held, default=None)
        counts = [str(sum(r.state == s for _, r in mine)) for s in ("holds", "broken", "not applicable")]
        rows.append([group, *counts, f"{tightest[0]:.2g} of 1 ({tightest[1]})" if tightest else ""])
    return rows
