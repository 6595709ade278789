"""Rows of a data set on this machine, and what both ways of loading share."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from verify.data.errors import CorpusError, one_line
from verify.data.rows import DatasetSpec

_READERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def local_rows(spec: DatasetSpec) -> list[str]:
    """The rows of a local data set, in order: a folder that `save_to_disk` wrote, a folder that
    `datasets.load_dataset` reads, or one file of rows (parquet, arrow, json, jsonl, csv), which is all of
    its split.

    Raises CorpusError where `spec.path` is none of these, cannot be read, or has no such split or column.
    """
    path = Path(spec.path)
    if path.is_file() and path.suffix not in _READERS:
        raise CorpusError(
            f"{path}: expected a data set ({', '.join(_READERS)} or a folder); a plain text goes to -f FILE"
        )
    import datasets

    with load_quietly(datasets), without_network(datasets):
        try:
            if path.is_file():
                found = datasets.load_dataset(
                    _READERS[path.suffix], data_files={spec.split: glob.escape(str(path))}
                )
            elif (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(str(path), spec.config)
        except Exception as error:
            raise CorpusError(f"{path}: expected a data set that can be read: {one_line(error)}") from error
        return rows_of(found, spec)


def rows_of(found: Any, spec: DatasetSpec) -> list[str]:
    """The rows of `spec` in a loaded `Dataset` (which is one split, whichever) or `DatasetDict`.

    Raises CorpusError for a missing split or column, for no rows, and for a row that is not a string.
    """
    if isinstance(found, dict):
        if spec.split not in found:
            raise CorpusError(f"{spec.path}: split: expected one of {', '.join(found)}, got {spec.split!r}")
        found = found[spec.split]
    if spec.column not in found.column_names:
        raise CorpusError(
            f"{spec.path}: column: expected one of {', '.join(found.column_names)}, got {spec.column!r}"
        )
    rows = found.with_format(None)[spec.column][:]
    if not rows:
        raise CorpusError(f"{spec.path}: split {spec.split!r}: expected rows, found none")
    for number, row in enumerate(rows):
        if not isinstance(row, str):
            raise CorpusError(
                f"{spec.path}: column {spec.column!r}, row {number}: "
                f"expected a string, found {type(row).__name__}"
            )
    return rows


@contextmanager
def without_network(datasets: ModuleType) -> Iterator[None]:
    """`datasets` as if HF_HUB_OFFLINE were set: it reads that variable only once, when it is imported."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def load_quietly(datasets: ModuleType) -> Iterator[None]:
    """Without the warnings of `datasets` on where it found its cache; its progress bars stay."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)
