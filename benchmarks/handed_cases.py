"""Kernels of a folder, each asked with the settings that show what it is, and judged as it is due.

    python benchmarks/handed_cases.py FOLDER [--only NAME,...] [--workers N] [--again] [--out FILE.json]

FOLDER holds files of kernels as others hand them over: `judged_wrongly.py`, `public_reports.py` and
`merge_only.py`; `handed_cases.json` beside this script says of each function how it is asked, and which
verdicts are true of it. What is no longer there, or stands in no list, is an error. Each run is a process of
its own, and is written down as it ends; what the file holds is not run again. Exit 1 where a verdict is not
due.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from commit import commit

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".json")
# Of `verify props` a law that is broken, and none.
LAW_BROKEN, LAWS_HOLD = "broken", "holds"
LIMIT_S = 300


class HandedCase(NamedTuple):
    """One function, asked once."""

    file: str  # its file in the folder
    function: str  # its name
    stated: str  # what is stated of its arithmetic, as a specification has it
    asked: str  # the settings, by name
    due: tuple[str, ...]  # verdicts that are true of it
    why: str  # what it is

    @property
    def key(self) -> str:
        return f"{self.file}::{self.function}{self.stated} {self.asked}"


def cases_of(table: dict[str, Any]) -> list[HandedCase]:
    """Every case of the table: `kinds` name verdicts, a line is [function, kind, settings, what it is]."""
    return [
        HandedCase(
            file=file,
            function=function.partition(",")[0],
            stated=function[len(function.partition(",")[0]) :],
            asked=asked,
            due=tuple(table["kinds"][kind]),
            why=why,
        )
        for file, lines in table["files"].items()
        for function, kind, settings, why in lines
        for asked in settings.split()
    ]


def not_listed(folder: Path, cases: list[HandedCase], left_out: dict[str, str]) -> list[str]:
    """Kernels of the folder that no case asks, and cases whose function is gone."""
    wrong = []
    for file in sorted({case.file for case in cases}):
        there = functions_of(folder / file)
        listed = {case.function for case in cases if case.file == file}
        wrong += [f"{file}::{name} stands in no list" for name in sorted(there - listed - set(left_out))]
        wrong += [f"{file}::{name} is not there" for name in sorted(listed - there)]
    return wrong


def functions_of(file: Path) -> set[str]:
    """Functions of a file that take q, k and v, or two parts, and those that it makes by a name in quotes."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            names = [argument.arg for argument in node.args.args]
            keywords = [argument.arg for argument in node.args.kwonlyargs]
            if (names[:1] == ["q"] and "kv_len" in keywords) or names[:2] == ["v_a", "s_a"]:
                found.add(node.name)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            first = next(iter(node.value.args), None)
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                found.add(first.value)
    return found


def run(case: HandedCase, folder: Path, settings: dict[str, list[str]]) -> dict[str, Any]:
    """One run: its verdict, why, and whether that is due."""
    command, *options = settings[case.asked]
    named = f"{folder / case.file}::{case.function}{case.stated}"
    spec = f"merge:{named}" if case.file.startswith("merge") else f"py:{named}"
    argv = [command, *options, "--device", "cpu", "--json"]
    argv += [spec] if command == "props" else ["--candidate", spec]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        more = [] if command == "props" else ["--out", str(Path(out) / "run")]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "verify", *argv, *more],
                capture_output=True,
                text=True,
                cwd=ROOT,
                check=False,
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            return {"verdict": "none", "reasons": [f"no end in {LIMIT_S} s"], "due": False}
    try:
        report = json.loads(done.stdout)
    except ValueError:
        verdict, reasons = ("refused" if done.returncode == 2 else "none"), done.stderr.splitlines()[-1:]
    else:
        if command == "props":
            broken = [f"{law['name']}: {law['reason']}" for law in report["laws"] if law["state"] == "broken"]
            verdict, reasons = (LAW_BROKEN if broken else LAWS_HOLD), broken[:2]
        else:
            verdict, reasons = report["verdict"], report["reasons"][:2]
    return {
        "verdict": verdict,
        "exit_code": done.returncode,
        "due": verdict in case.due,
        "reasons": [reason.replace(f"{folder}/", "") for reason in reasons],
        "seconds": round(time.perf_counter() - started, 1),
        "commit": commit(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/handed-cases.json")
    arguments = parser.parse_args()
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    cases = cases_of(table)
    folder = arguments.folder.resolve()
    for line in (wrong := not_listed(folder, cases, table["no_kernels"])):
        print(line)
    if wrong:
        return 1
    found: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    only = set(filter(None, arguments.only.split(",")))
    asked = [case for case in cases if not only or case.function in only]
    due = [case for case in asked if arguments.again or case.key not in found]
    with ThreadPoolExecutor(arguments.workers) as pool:
        running = {pool.submit(run, case, folder, table["settings"]): case for case in due}
        for done in as_completed(running):
            case, row = running[done], done.result()
            found[case.key] = row
            keys = [each.key for each in cases if each.key in found]
            arguments.out.write_text(json.dumps({key: found[key] for key in keys}, indent=1) + "\n")
            said = "" if row["due"] else f"  NOT DUE: expected {' or '.join(case.due)}: {row['reasons'][:1]}"
            print(f"{case.key:56} {row['verdict']:13} {row.get('seconds', 0):6.1f} s{said}", flush=True)
    wrong = [f"{case.key}: {found[case.key]['verdict']}" for case in asked
             if case.key in found and found[case.key]["verdict"] not in case.due]  # fmt: skip
    print(f"{len(asked)} runs, {len(wrong)} judged otherwise than is due", *wrong, sep="\n  ")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
