"""The folder of a run: settings, one sub-folder a finished group, and at the end the results.

    settings.json                what was asked, and fingerprints of model and text
    groups/00000/                tokens.parquet, layers.parquet, top1.parquet, state.json of windows 0 ..
    groups/00005.layers          windows 5 .. after some of their layers, to go on from
    run.json  tokens.parquet  layers.parquet  top1.parquet  report.md  report.html

A group is written under another name and renamed when it is whole, so that a run that was cut off at any
moment goes on from the last whole group.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from verify.machine.errors import UsageError
from verify.machine.jsontext import to_json_text

if TYPE_CHECKING:
    # Reports are made from a finished folder without torch: only groups and checkpoints need it.
    import torch

    from verify.ppl.checkpoint import Checkpoint
    from verify.ppl.groups import GroupResult

SETTINGS, GROUPS, RESULT = "settings.json", "groups", "run.json"
REPORT, PAGE = "report.md", "report.html"
# What reading a file that is not a whole checkpoint raises.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError)
# Ends the name of what is being written.
PART = ".part"


def _of_a_run(stored: dict[str, Any]) -> bool:
    return all(isinstance(stored.get(name), dict) for name in ("settings", "identity"))


class RunFolder:
    """A run's folder. Raises UsageError where it cannot be written or read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, *, groups: bool = True) -> RunFolder:
        """A new folder; `groups`: for a run that goes on a group at a time."""
        if (path / SETTINGS).exists() or (path / RESULT).exists():
            other = f"go on with --resume {path}, or name another" if groups else "name another folder"
            raise UsageError(f"--out {path}: holds a run already; {other}")
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UsageError(f"--out {str(path)!a}: expected a name in UTF-8") from None
        try:
            (path / GROUPS if groups else path).mkdir(parents=True, exist_ok=True)
            probe = path / "writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UsageError(f"--out {path}: cannot be written: {error.strerror or error}") from None
        return cls(path)

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        if not (path / SETTINGS).is_file():
            raise UsageError(f"--resume {path}: no {SETTINGS} there, expected the folder of a run")
        if (path / RESULT).is_file() and not (path / GROUPS).is_dir():
            raise UsageError(f"--resume {path}: that run is finished, see {path / PAGE}")
        return cls(path)

    def write_settings(self, settings: dict[str, Any]) -> None:
        self.write_json(SETTINGS, settings)

    def read_settings(self, command: str) -> dict[str, Any]:
        """Raises UsageError where they are not those of a run of this command."""
        try:
            found: dict[str, Any] = json.loads((self.path / SETTINGS).read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"--resume {self.path}: {SETTINGS} cannot be read: {error}") from None
        if not isinstance(found, dict) or found.get("command") != command or not _of_a_run(found):
            raise UsageError(f"--resume {self.path}: {SETTINGS} is not that of a run of verify {command}")
        return found

    def save_group(self, first_window: int, result: GroupResult) -> None:
        whole = self._group(first_window)
        part = whole.with_name(whole.name + PART)
        with self._writing():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            pq.write_table(result.tokens, part / "tokens.parquet")
            pq.write_table(result.layers, part / "layers.parquet")
            pq.write_table(result.top1, part / "top1.parquet")
            (part / "state.json").write_text(json.dumps(result.state()))
            part.rename(whole)
        self.drop_checkpoint(first_window)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        from verify.ppl.checkpoint import write_checkpoint

        whole = self._layers(checkpoint.windows.start)
        part = whole.with_name(whole.name + PART)
        with self._writing():
            write_checkpoint(part, checkpoint)
            part.rename(whole)

    def load_checkpoint(self, first_window: int, device: torch.device) -> Checkpoint | None:
        """What the group that begins there was left with. Raises UsageError where it cannot be read."""
        from verify.ppl.checkpoint import read_checkpoint

        path = self._layers(first_window)
        if not path.is_file():
            return None
        try:
            return read_checkpoint(path, device)
        except _UNREADABLE as error:
            raise UsageError(
                f"--resume {self.path}: {path.name} of {GROUPS} cannot be read ({type(error).__name__}):"
                " remove it, and its windows are run again"
            ) from None

    def drop_checkpoint(self, first_window: int) -> None:
        self._layers(first_window).unlink(missing_ok=True)

    def finished_groups(self) -> list[int]:
        """First windows of the groups that are there, in order."""
        return sorted(int(f.name) for f in (self.path / GROUPS).glob("*") if f.name.isdigit())

    def load_group(self, first_window: int) -> GroupResult:
        """A finished group. Raises UsageError where it cannot be read."""
        from verify.ppl.groups import GroupResult

        folder = self._group(first_window)
        try:
            return GroupResult.from_state(
                pq.read_table(folder / "tokens.parquet"),
                pq.read_table(folder / "layers.parquet"),
                pq.read_table(folder / "top1.parquet"),
                json.loads((folder / "state.json").read_text()),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--resume {self.path}: {folder.name} of {GROUPS} cannot be read ({type(error).__name__}):"
                " remove it, and its windows are run again"
            ) from None

    def write_results(self, result: GroupResult, run: dict[str, Any]) -> None:
        """The run's own files; the groups are kept until `finish`."""
        with self._writing():
            tables = {"tokens": result.tokens, "layers": result.layers, "top1": result.top1}
            for name, table in tables.items():
                part = self.path / f"{name}.parquet{PART}"
                pq.write_table(table, part)
                part.rename(self.path / f"{name}.parquet")
        self.write_json(RESULT, run)

    def finish(self) -> None:
        """Results and reports are there: the groups go, and the run cannot be resumed any more."""
        # Renamed first: a run that is killed here is finished, not one whose groups are broken.
        gone = self.path / (GROUPS + PART)
        (self.path / GROUPS).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def write_text(self, name: str, text: str) -> None:
        """The file is there whole, or not at all."""
        part = self.path / (name + PART)
        with self._writing():
            part.write_text(text, encoding="utf-8", errors="surrogateescape")
            part.rename(self.path / name)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.write_text(name, to_json_text(content))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            for part in [*self.path.glob("*" + PART), *self.path.glob(f"{GROUPS}/*{PART}")]:
                shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
            raise UsageError(
                f"--out {self.path}: cannot be written: {error.strerror or error};"
                f" what was finished is kept, go on with --resume {self.path}"
            ) from None

    def _group(self, first_window: int) -> Path:
        return self.path / GROUPS / f"{first_window:05d}"

    def _layers(self, first_window: int) -> Path:
        return self.path / GROUPS / f"{first_window:05d}.layers"
