"""Logits files of the same text compared with the first of them: the content of a `run.json`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from verify.engines.closing_table import ClosingRow, base_row, named, other_row
from verify.engines.conclusion import Comparison, compare, comparison_json, file_json
from verify.engines.divergence import FileScores, check_same_text, score_file, score_pair
from verify.engines.logits_file import Layout, LogitsFile
from verify.judge.verdict import EXIT_CODES, Decision, Verdict, overall
from verify.machine.errors import UsageError
from verify.machine.terminal import Progress


class KldListener(Protocol):
    """Who is told how the comparison goes on."""

    def reading(self, path: str) -> AbstractContextManager[Progress | None]:
        """This file is read, while the context lasts."""
        ...

    def file(self, path: str, layout: Layout, scores: FileScores) -> None:
        """What one file holds."""

    def comparison(self, found: Comparison) -> None:
        """What the last file is beside the base."""


class ComparedFiles(NamedTuple):
    """verdict: None of one file alone; files, pairs: as in run.json; rows: of the closing table."""

    verdict: Verdict | None
    reasons: list[str]
    files: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    rows: list[ClosingRow]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict] if self.verdict else 0

    def to_json(self) -> dict[str, Any]:
        """Without `schema` and `command`, which are the command's."""
        return {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "reasons": self.reasons,
            "files": self.files,
            "pairs": self.pairs,
            "closing_table": [
                {k: e._asdict() if hasattr(e, "_asdict") else e for k, e in row._asdict().items()}
                for row in self.rows
            ],
        }


def check_options(max_kld: float | None, models: Sequence[str] | None = None, files: int = 0) -> None:
    """models: GGUF files, one for each of so many logits files, or none. Raises UsageError."""
    if max_kld is not None and not max_kld >= 0:
        raise UsageError(f"--max-kld {max_kld:g}: expected a number from 0")
    if models and len(models) != files:
        raise UsageError(f"-m: {len(models)} models, expected one for each of {files} files, or none")
    for model in models or []:
        if not Path(model).is_file():
            raise UsageError(f"-m {model}: no such file")


def compare_files(
    base_path: str,
    other_paths: Sequence[str],
    listener: KldListener,
    *,
    max_kld: float | None,
    models: Sequence[str] | None = None,
) -> ComparedFiles:
    """Read and compare. models: GGUF files, one a logits file, or None. Raises UsageError."""
    files: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    rows: list[ClosingRow] = []
    decisions: list[Decision] = []
    sized: list[str | None] = [*models] if models else [None] * (1 + len(other_paths))
    names = [named(*x) for x in zip([base_path, *other_paths], sized, strict=True)]

    def base_is_known(scores: FileScores) -> None:
        listener.file(base_path, base.layout, scores)
        files.append(file_json(base_path, scores))
        rows.append(base_row(*names[0], scores.nll))

    with LogitsFile(base_path) as base:
        # Every file is looked at before the first is read through.
        for path in other_paths:
            with LogitsFile(path) as other:
                check_same_text(base, other)
        if not other_paths:
            with listener.reading(base_path) as progress:
                scores = score_file(base, progress)
            base_is_known(scores)
        for path, name in zip(other_paths, names[1:], strict=True):
            with LogitsFile(path) as other, listener.reading(path) as progress:
                pair = score_pair(base, other, progress)
            if not files:
                base_is_known(pair.base)
            listener.file(path, base.layout, pair.other)
            files.append(file_json(path, pair.other))
            found = compare(pair, first_scored=base.layout.first_scored, max_kld=max_kld)
            listener.comparison(found)
            pairs.append({"reference": base_path, **comparison_json(path, found)})
            decisions.append(found.decision)
            rows.append(other_row(*name, found.table, pair.kld))
    verdict = overall(decisions) if decisions else None
    reasons = [r for d in decisions if d.verdict == verdict for r in d.reasons]
    return ComparedFiles(verdict, reasons, files, pairs, rows)
