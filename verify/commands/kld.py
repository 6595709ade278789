"""`verify kld`: logits files of llama-perplexity compared."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from verify.commands import options

HELP = "Logits files of llama-perplexity --kl-divergence-base: its own table, and what it cannot show."


def command(
    base: Annotated[str, typer.Argument(help="logits file that the others are compared with")],
    others: Annotated[list[str] | None, typer.Argument(help="logits files of the same tokens")] = None,
    max_kld: Annotated[
        float | None,
        typer.Option("--max-kld", help="mean KLD that still is round-off; more is degraded"),
    ] = None,
    json_: options.Json = False,
) -> int:
    """Compare; returns the exit code of the gravest verdict, 0 for one file alone."""
    from verify.machine.errors import UsageError

    if max_kld is not None and not max_kld >= 0:
        raise UsageError(f"--max-kld {max_kld:g}: expected a number from 0")
    screen = sys.stderr if json_ else sys.stdout
    run = compare_files(base, others or [], max_kld=max_kld, screen=screen)
    if json_:
        from verify.machine.jsontext import to_json_text

        print(to_json_text(run), end="")
    return int(run["exit_code"])


def compare_files(
    base_path: str, other_paths: list[str], *, max_kld: float | None, screen: Any
) -> dict[str, Any]:
    """Read, compare and print; the content of a `run.json`. Raises UsageError."""
    from verify.engines.conclusion import compare, comparison_json, file_json
    from verify.engines.divergence import check_same_text, score_file, score_pair
    from verify.engines.logits_file import LogitsFile
    from verify.judge.verdict import EXIT_CODES, overall
    from verify.reports.kld import print_comparison, print_file
    from verify.reports.tables import progress_of

    files, pairs, decisions = [], [], []
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
        for path in other_paths:
            with LogitsFile(path) as other, progress_of(path) as progress:
                pair = score_pair(base, other, progress)
            if not files:
                print_file(base_path, base.layout, pair.base, screen)
                files.append(file_json(base_path, pair.base))
            print_file(path, base.layout, pair.other, screen)
            files.append(file_json(path, pair.other))
            found = compare(pair, first_scored=base.layout.first_scored, max_kld=max_kld)
            print_comparison(found, screen)
            pairs.append({"reference": base_path, **comparison_json(path, found)})
            decisions.append(found.decision)
    verdict = overall(decisions) if decisions else None
    return {
        "schema": 1,
        "command": "kld",
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict] if verdict else 0,
        "reasons": [r for d in decisions if d.verdict == verdict for r in d.reasons],
        "files": files,
        "pairs": pairs,
    }
