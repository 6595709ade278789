"""`verify kld`: logits files of llama-perplexity compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from verify.commands import options
from verify.engines.closing_table import ClosingRow, base_row, comma_separated, named, other_row
from verify.engines.closing_table import markdown as markdown_of
from verify.engines.conclusion import compare, comparison_json, file_json
from verify.engines.divergence import check_same_text, score_file, score_pair
from verify.engines.logits_file import LogitsFile
from verify.judge.verdict import EXIT_CODES, overall
from verify.machine.errors import UsageError
from verify.machine.jsontext import to_json_text
from verify.machine.outfile import check_writable
from verify.reports.kld import print_closing_table, print_comparison, print_file
from verify.reports.tables import progress_of


def command(
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
    json_: options.Json = False,
) -> int:
    """Compare; returns the exit code of the gravest verdict, 0 for one file alone."""

    if max_kld is not None and not max_kld >= 0:
        raise UsageError(f"--max-kld {max_kld:g}: expected a number from 0")
    others = others or []
    if models and len(models) != 1 + len(others):
        raise UsageError(
            f"-m: {len(models)} models, expected one for each of {1 + len(others)} files, or none"
        )
    for model in models or []:
        if not Path(model).is_file():
            raise UsageError(f"-m {model}: no such file")
    for option, path in (("--markdown", markdown), ("--csv", csv)):
        if path is not None:
            check_writable(option, path)
    screen = sys.stderr if json_ else sys.stdout
    written = {"markdown": markdown, "csv": csv}
    run = compare_files(base, others, max_kld=max_kld, screen=screen, models=models, tables=written)
    if json_:
        print(to_json_text(run), end="")
    return int(run["exit_code"])


def compare_files(
    base_path: str,
    other_paths: list[str],
    *,
    max_kld: float | None,
    screen: Any,
    models: list[str] | None = None,
    tables: dict[str, Path | None] | None = None,
) -> dict[str, Any]:
    """Read, compare and print; the content of a `run.json`. Raises UsageError.

    models: GGUF files, one a logits file, or None; tables: where the closing table goes as `markdown`, `csv`.
    """

    files, pairs, decisions, rows = [], [], [], []
    sized: list[str | None] = [*models] if models else [None] * (1 + len(other_paths))
    names = [named(*x) for x in zip([base_path, *other_paths], sized, strict=True)]
    with LogitsFile(base_path) as base:
        # Every file is looked at before the first is read through.
        for path in other_paths:
            with LogitsFile(path) as other:
                check_same_text(base, other)
        if not other_paths:
            with progress_of(base_path) as progress:
                scores = score_file(base, progress)
            print_file(base_path, base.layout, scores, screen)
            files.append(file_json(base_path, scores))
            rows.append(base_row(*names[0], scores.nll))
        for path, name in zip(other_paths, names[1:], strict=True):
            with LogitsFile(path) as other, progress_of(path) as progress:
                pair = score_pair(base, other, progress)
            if not files:
                print_file(base_path, base.layout, pair.base, screen)
                files.append(file_json(base_path, pair.base))
                rows.append(base_row(*names[0], pair.base.nll))
            print_file(path, base.layout, pair.other, screen)
            files.append(file_json(path, pair.other))
            found = compare(pair, first_scored=base.layout.first_scored, max_kld=max_kld)
            print_comparison(found, screen)
            pairs.append({"reference": base_path, **comparison_json(path, found)})
            decisions.append(found.decision)
            rows.append(other_row(*name, found.table, pair.kld))
    if len(other_paths) > 1:
        print_closing_table(rows, screen)
    _write_tables(rows, tables or {}, screen)
    verdict = overall(decisions) if decisions else None
    return {
        "schema": 1,
        "command": "kld",
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict] if verdict else 0,
        "reasons": [r for d in decisions if d.verdict == verdict for r in d.reasons],
        "files": files,
        "pairs": pairs,
        "closing_table": [
            {k: e._asdict() if hasattr(e, "_asdict") else e for k, e in row._asdict().items()} for row in rows
        ],
    }


def _write_tables(rows: list[ClosingRow], to: dict[str, Path | None], screen: Any) -> None:

    for form, write in (("markdown", markdown_of), ("csv", comma_separated)):
        if (path := to.get(form)) is None:
            continue
        try:
            path.write_text(write(rows), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--{form} {path}: cannot be written: {error.strerror or error}") from None
        print(f"table: {path}", file=screen)
