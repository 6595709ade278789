"""`verify kld`: logits files of llama-perplexity compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from verify.commands import options
from verify.engines.compared_files import check_options, compare_files
from verify.machine.command_line import typed_again
from verify.machine.jsontext import to_json_text
from verify.machine.outfile import check_new_folder, check_writable
from verify.reports.kld import KldScreen


def command(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="logits file that the others are compared with")],
    others: Annotated[list[str] | None, typer.Argument(help="logits files of the same tokens")] = None,
    max_kld: Annotated[
        float | None,
        typer.Option("--max-kld", help="mean KLD that still is round-off; more is degraded"),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "-m", "--model", help="GGUF of each file, in their order, for the closing table's sizes"
        ),
    ] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="closing table as Markdown")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="closing table as CSV")] = None,
    out: options.Out = None,
    json_: options.Json = False,
) -> int:
    """Compare; returns the exit code of the gravest verdict, 0 for one file alone."""
    check_new_folder(out)
    check_options(max_kld, models, 1 + len(others or []))
    if markdown is not None:
        check_writable("--markdown", markdown, [base, *(others or []), *(models or [])])
    if csv is not None:
        check_writable("--csv", csv, [base, *(others or []), *(models or []), markdown])
    screen = KldScreen(sys.stderr if json_ else sys.stdout)
    found = compare_files(base, others or [], screen, max_kld=max_kld, models=models)
    screen.closing_table(found.rows)
    screen.write_tables(found.rows, markdown=markdown, csv=csv)
    content = {"schema": 1, "command": "kld", **found.to_json()}
    if out is not None:
        from verify.reports.writing import write_run

        write_run(out, content, typed_again(context), screen.to)
    if json_:
        print(to_json_text(content), end="")
    return found.exit_code
