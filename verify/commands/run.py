"""`verify run`: all that `[tool.verify]` of a pyproject.toml asks for."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from verify.commands import options
from verify.machine.errors import UsageError
from verify.planned import find_project, planned_runs
from verify.reports.ci import check_ci_options

# The gravest first: a fault, nothing measured, bad input, undecided, interrupted.
DEFAULT_OUT = Path("runs/verify")
GRAVITY = (130, 1, 4, 2, 3, 0)


def command(
    project: Annotated[
        Path | None,
        typer.Option("--project", help="a pyproject.toml; default: the nearest with [tool.verify]"),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="folder for reports and JUnit files")] = Path(
        "runs/verify"
    ),
    format_: options.Format = "text",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the commands, and run none")] = False,
) -> int:
    """Run the command. Exits with the gravest code of what it ran."""
    check_ci_options(format_, None)
    file = project or find_project(Path.cwd())
    if not file.is_file():
        raise UsageError(f"--project {file}: no such file")
    runs = planned_runs(file)
    folder = file.resolve().parent
    codes = []
    for each in runs:
        words = list(each.words)
        place = out if out.is_absolute() else folder / out
        if each.command in ("diff", "ppl"):
            words += ["--out", str(place / each.name)]
        words += ["--junit", str(place / f"{each.name}.xml")]
        if format_ != "text":
            words += ["--format", format_]
        print(f"$ {shlex.join(['verify', *words])}", flush=True)
        if dry_run:
            continue
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {out}: {error.strerror or error}") from None
        done = subprocess.run([sys.executable, "-m", "verify", *words], cwd=folder, check=False)
        codes.append(done.returncode if done.returncode in GRAVITY else 4)
        print(f"  {each.name}: exit {codes[-1]}", flush=True)
        if codes[-1] == 130:
            break
    return min(codes, key=GRAVITY.index, default=0)
