"""`verify sweep`: speed logs of sweep-bench compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from verify.commands import options
from verify.engines.plans import setting_of
from verify.engines.sweep import (
    COLUMNS,
    compare,
    fit_line,
    medians,
    pairs_of,
    split_starts,
    to_json,
)
from verify.engines.sweep_log import read_logs
from verify.kernels.plans.policy import policy_named
from verify.machine.command_line import typed_again
from verify.machine.errors import UsageError
from verify.machine.jsontext import to_json_text
from verify.machine.outfile import check_new_folder, check_writable
from verify.reports.sweep import compared_lines, line_text, note_lines, plot, policy_lines, print_times

# What --out may end in to be a picture.
PICTURES = (".png", ".svg", ".pdf")


def command(
    context: typer.Context,
    logs: Annotated[list[str], typer.Argument(help="logs: tables, JSON or CSV; the first is compared with")],
    policy: Annotated[str | None, typer.Option("--policy", help="ik-1183, say: needs --arch")] = None,
    arch: Annotated[
        str | None, typer.Option("--arch", "-m", help="glm4moe, glm-4.5-air, 96/8x128, or a GGUF file")
    ] = None,
    cache_type: Annotated[str, typer.Option("--cache-type", "-ctk", help="f16, q8_0 ...")] = "f16",
    gpus: options.Gpus = 1,
    split_mode: options.SplitMode = "layer",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="picture (sweep.png, sweep.svg), or a new folder for run.json and reports"
        ),
    ] = None,
    json_: options.Json = False,
) -> int:
    """Compare; exit 1 for a significant slowdown, else 0."""
    if (policy is None) != (arch is None):
        raise UsageError("--policy and --arch: expected both or neither")
    if out is not None and out.suffix and out.suffix not in PICTURES:
        raise UsageError(f"--out {out}: expected a name that ends in .png, .svg or .pdf, or a folder's")
    picture, folder = (out, None) if out is not None and out.suffix else (None, out)
    check_new_folder(folder)
    if picture is not None:
        check_writable("--out", picture, logs)
    chosen = policy_named(policy) if policy else None
    setting = setting_of(arch, cache_type, gpus, split_mode) if arch else None
    found = [log for path in logs for log in read_logs(path)]
    if len({log.label for log in found}) < len(found):
        # The same name in two folders: the folder tells them apart.
        found = [log._replace(label=f"{log.path.parent / log.label}") for log in found]
    pairs = pairs_of(found)
    screen = sys.stderr if json_ else sys.stdout
    compared = [
        c for main, other in pairs for column in COLUMNS if (c := compare(main, other, column)) is not None
    ]
    lines = {
        (log.label, column): fit_line(list(times := medians(log, column)), list(times.values()))
        for log in found
        for column in COLUMNS
    }
    print_times(found, compared, screen)
    said = [
        line_text(label, column, line)
        for (label, column), line in lines.items()
        if line is not None and column == "t_tg"
    ]
    said += [text for c in compared for text in compared_lines(c)]
    starts = []
    if chosen is not None and setting is not None:
        starts = split_starts(chosen, setting, found[0])
        said += policy_lines(chosen, setting, starts, compared)
    for text in (*note_lines(found, pairs), *said):
        print(text, file=screen)
    if picture is not None:
        try:
            plot(found, compared, starts, picture)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be written: {error.strerror or error}") from None
        print(f"picture: {out}", file=screen)
    exit_code = 1 if any(c.slower for c in compared) else 0
    content = to_json(found, lines, compared, starts, exit_code)
    if folder is not None:
        from verify.reports.writing import write_run

        write_run(folder, {**content, "said": said}, typed_again(context), screen)
    if json_:
        print(to_json_text(content), end="")
    return exit_code
