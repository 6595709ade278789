"""The folder of a run: settings, one sub-folder a finished group, and at the end the results.

    settings.json                what was asked, and fingerprints of model and text
    groups/00000/                tokens, layers, top1, alone (.parquet) and state.json of windows 0 ..
    groups/00005.layers          windows 5 .. after some of their layers, to go on from
    groups/000-00000.parquet     of `--only`, in the place of both: windows 0 .. of pass 0
    run.json  tokens.parquet  layers.parquet  top1.parquet  alone.parquet  report.md  report.html

A group is written under another name and renamed when it is whole, so that a run that was cut off at any
moment goes on from the last whole group. A folder may be a stranger's: links in it are not followed, and only
what a run has written is written over or removed (`verify.machine.files`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from verify.arms.records import SCHEMA
from verify.kernels.said import one_line
from verify.machine.errors import UsageError
from verify.machine.files import (
    Lock,
    folder_written_whole,
    is_plain_file,
    is_plain_folder,
    open_plain,
    part_names,
    read_json,
    write_whole,
    written_whole,
)
from verify.machine.jsontext import to_json_text

if TYPE_CHECKING:
    # Reports are made from a finished folder without torch: only groups and checkpoints need it.
    import torch

    from verify.ppl.checkpoint import Checkpoint
    from verify.ppl.groups import GroupResult

SETTINGS, GROUPS, RESULT = "settings.json", "groups", "run.json"
REPORT, PAGE = "report.md", "report.html"
STATE = "state.json"
TABLES = ("tokens", "layers", "top1", "alone")
# What reading a file that is not a whole checkpoint or table raises.
_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    EOFError,
    MemoryError,
    pa.ArrowException,
    pickle.UnpicklingError,
)
_OWN_FILES = {SETTINGS, RESULT, REPORT, PAGE, *(f"{name}.parquet" for name in TABLES)}
_GROUP_FILES = {STATE, *(f"{name}.parquet" for name in TABLES)}
_GROUP, _LAYERS = re.compile(r"\d{5,}"), re.compile(r"\d{5,}\.layers")
# Of runs of several passes, whose groups are a table each: the pass, and the first window.
_PART = re.compile(r"(\d{3,})-(\d{5,})\.parquet")
# Where what somebody else has put among the groups is left.
_OTHERS = "groups.others"


def _of_a_run(stored: dict[str, Any]) -> bool:
    return all(isinstance(stored.get(name), dict) for name in ("settings", "identity"))


def refuse_a_run(path: Path, *, groups: bool) -> None:
    """Raises UsageError where the folder holds a run. groups: of a kind that can be gone on with."""
    if (path / SETTINGS).exists() or (path / RESULT).exists():
        other = f"go on with --resume {path}, or name another" if groups else "name another folder"
        raise UsageError(f"--out {path}: holds a run already; {other}")
    if path.is_dir() and (there := sorted(path.iterdir())):
        raise UsageError(
            f"--out {path}: holds other files ({there[0].name}), expected a new or an empty folder"
        )


class RunFolder:
    """A run's folder. Raises UsageError where it cannot be written or read.

    One that was created or reopened is this process's alone until `release`.
    """

    def __init__(self, path: Path, lock: Lock | None = None, *, called: str = "--out ") -> None:
        self.path, self._lock, self._called = path, lock, called
        # Of what the groups were measured with.
        self._settings = ""

    @classmethod
    def create(cls, path: Path, *, groups: bool = True) -> RunFolder:
        """A new folder, or an empty one; `groups`: for a run that goes on a group at a time."""
        refuse_a_run(path, groups=groups)
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise UsageError(f"--out {str(path)!a}: expected a name in UTF-8") from None
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path, "--out")
            if there := sorted(path.iterdir()):
                raise UsageError(
                    f"--out {path}: holds other files ({there[0].name}), expected a new or an empty folder"
                )
            if groups:
                (path / GROUPS).mkdir()
            else:
                with written_whole(path / RESULT):
                    pass
                (path / RESULT).unlink()
        except OSError as error:
            raise UsageError(f"--out {path}: cannot be written: {error.strerror or error}") from None
        return cls(path, lock)

    @classmethod
    def begin(cls, out: Path | None, command: str, *, groups: bool = True) -> RunFolder:
        """`create`, of a folder in runs/ that is named after the command and the time where none is given."""
        if out is not None:
            return cls.create(out, groups=groups)
        first = Path("runs") / f"{command}-{datetime.now():%Y%m%d-%H%M%S}"
        for number in itertools.count(1):
            name = first if number == 1 else first.with_name(f"{first.name}-{number}")
            # Another run may have begun in the same second.
            with suppress(OSError):
                name.mkdir(parents=True)
                break
            if not name.exists():
                break
        return cls.create(name, groups=groups)

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        if not is_plain_file(path / SETTINGS):
            raise UsageError(f"--resume {path}: no {SETTINGS} there, expected the folder of a run")
        if is_plain_file(path / RESULT) and not is_plain_folder(path / GROUPS):
            raise UsageError(f"--resume {path}: that run is finished, see {path / PAGE}")
        for name in (GROUPS, *(f"{GROUPS}/{one.name}" for one in _entries(path / GROUPS)), "captured"):
            if (path / name).is_symlink():
                raise UsageError(f"--resume {path}: {name} is a link, which no run makes")
        lock = _lock(path, "--resume")
        try:
            (path / GROUPS).mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"--resume {path}: cannot be written: {error.strerror or error}") from None
        return cls(path, lock)

    def absolute(self) -> RunFolder:
        """The same, whatever the current folder becomes."""
        self.path = self.path.absolute()
        return self

    def release(self) -> None:
        """Others may have it."""
        if self._lock is not None:
            self._lock.release()

    def write_settings(self, settings: dict[str, Any]) -> None:
        self.write_json(SETTINGS, settings)
        self._settings = _digest(settings["settings"])

    def read_settings(self, command: str) -> dict[str, Any]:
        """Raises UsageError where they are not those of a run of this command."""
        try:
            found: dict[str, Any] = read_json(self.path / SETTINGS)
        except (OSError, ValueError) as error:
            raise UsageError(f"--resume {self.path}: {SETTINGS} cannot be read: {error}") from None
        if not isinstance(found, dict) or found.get("command") != command or not _of_a_run(found):
            raise UsageError(f"--resume {self.path}: {SETTINGS} is not that of a run of verify {command}")
        if (schema := found.get("schema", 2)) != SCHEMA:
            raise UsageError(
                f"--resume {self.path}: {SETTINGS} is of schema {schema}, expected {SCHEMA}: another version"
                " of verify began that run; go on with that one, or run it again into another folder"
            )
        self._settings = _digest(found["settings"])
        return found

    def save_group(self, first_window: int, result: GroupResult) -> None:
        with self._writing(), folder_written_whole(self._group(first_window)) as part:
            for name in TABLES:
                pq.write_table(getattr(result, name), part / f"{name}.parquet")
            state = {**result.state(), "settings": self._settings}
            (part / STATE).write_text(json.dumps(state))
        self.drop_checkpoint(first_window)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        from verify.ppl.checkpoint import write_checkpoint

        with self._writing(), written_whole(self._layers(checkpoint.windows.start)) as part:
            write_checkpoint(part, checkpoint)

    def load_checkpoint(self, first_window: int, device: torch.device) -> Checkpoint | None:
        """What the group that begins there was left with. Raises UsageError where it cannot be read."""
        from verify.ppl.checkpoint import read_checkpoint

        path = self._layers(first_window)
        if not is_plain_file(path):
            return None
        try:
            with open_plain(path) as file:
                return read_checkpoint(file, device)
        except _UNREADABLE as error:
            raise UsageError(
                f"--resume {self.path}: {path.name} of {GROUPS} cannot be read ({type(error).__name__}):"
                " remove it, and its windows are run again"
            ) from None

    def has_checkpoint(self, first_window: int) -> bool:
        return is_plain_file(self._layers(first_window))

    def drop_checkpoint(self, first_window: int) -> None:
        self._layers(first_window).unlink(missing_ok=True)

    def finished_groups(self) -> list[int]:
        """First windows of the groups that are there, in order."""
        return sorted(int(one.name) for one in _entries(self.path / GROUPS) if _GROUP.fullmatch(one.name))

    def load_group(
        self, first_window: int, check: Callable[[GroupResult], None] = lambda result: None
    ) -> GroupResult:
        """A finished group. check: raises ValueError for one that is not this run's. Raises UsageError."""
        from verify.ppl.groups import GroupResult

        folder = self._group(first_window)
        try:
            tables = {name: _table(folder / f"{name}.parquet") for name in TABLES}
            state = read_json(folder / STATE)
            if state.get("settings") != self._settings:
                raise ValueError("is of a run with other settings")
            found = GroupResult.from_state(tables, state)
            check(found)
            return found
        except _UNREADABLE as error:
            said = one_line(str(error), 120) if isinstance(error, ValueError) else type(error).__name__
            raise UsageError(
                f"--resume {self.path}: {folder.name} of {GROUPS} cannot be read ({said}):"
                " remove it, and its windows are run again"
            ) from None

    def save_part(self, number: int, first_window: int, table: pa.Table) -> None:
        """Keep a finished group of pass `number`, which is one table."""
        self.write_table(f"{GROUPS}/{number:03d}-{first_window:05d}.parquet", table)

    def parts(self, number: int) -> Iterator[tuple[int, pa.Table]]:
        """First window and table of each finished group of pass `number`, in order. Raises UsageError."""
        for one in _entries(self.path / GROUPS):
            named = _PART.fullmatch(one.name)
            if named is None or int(named[1]) != number:
                continue
            try:
                yield int(named[2]), _table(one)
            except _UNREADABLE as error:
                raise UsageError(
                    f"--resume {self.path}: {one.name} of {GROUPS} cannot be read ({type(error).__name__}):"
                    " remove it, and its windows are run again"
                ) from None

    def write_results(self, result: GroupResult, run: dict[str, Any]) -> None:
        """The run's own files; the groups are kept until `finish`."""
        with self._writing():
            for name in TABLES:
                with written_whole(self.path / f"{name}.parquet") as part:
                    pq.write_table(getattr(result, name), part)
        self.write_json(RESULT, run)

    def finish(self) -> None:
        """Results and reports are there: the groups go, and the run cannot be resumed any more."""
        groups, gone = self.path / GROUPS, self.path / _OTHERS
        with suppress(OSError):
            # Renamed first: a run that is killed here is finished, not one whose groups are broken.
            groups.rename(gone)
            for one in _entries(gone):
                if _GROUP.fullmatch(one.name) and is_plain_folder(one):
                    _remove_files(one, _GROUP_FILES)
                elif (_LAYERS.fullmatch(one.name) or _PART.fullmatch(one.name)) and is_plain_file(one):
                    one.unlink()
        self._sweep(gone, lambda name: any(kind.fullmatch(name) for kind in (_GROUP, _LAYERS, _PART)))
        self._sweep(self.path, lambda name: name in _OWN_FILES)
        # What is left in it is not ours.
        with suppress(OSError):
            gone.rmdir()

    def _sweep(self, folder: Path, is_ours: Callable[[str], bool]) -> None:
        """Remove what a run that was killed while it wrote has left."""
        for path, name in part_names(folder):
            if not is_ours(name):
                continue
            with suppress(OSError):
                if is_plain_folder(path) and folder != self.path:
                    _remove_files(path, _GROUP_FILES)
                else:
                    path.unlink()

    def write_table(self, name: str, table: pa.Table) -> None:
        with self._writing(), written_whole(self.path / name) as part:
            pq.write_table(table, part)

    def write_text(self, name: str, text: str) -> None:
        """The file is there whole, or not at all. Halves of surrogate pairs are written out."""
        self.write_bytes(name, text.encode("utf-8", "backslashreplace"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """The file is there whole, or not at all."""
        with self._writing():
            write_whole(self.path / name, content)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self.write_text(name, to_json_text(content))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = f"; what was finished is kept, go on with --resume {self.path}" if self.goes_on else ""
            raise UsageError(
                f"{self._called}{self.path}: cannot be written: {error.strerror or error}{kept}"
            ) from None

    @property
    def goes_on(self) -> bool:
        """Whether a run that is cut off now can be gone on with."""
        return is_plain_folder(self.path / GROUPS)

    def _group(self, first_window: int) -> Path:
        return self.path / GROUPS / f"{first_window:05d}"

    def _layers(self, first_window: int) -> Path:
        return self.path / GROUPS / f"{first_window:05d}.layers"


def _lock(path: Path, option: str) -> Lock:
    try:
        return Lock(path)
    except BlockingIOError:
        raise UsageError(f"{option} {path}: another run is writing there now") from None
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be used: {error.strerror or error}") from None


def _digest(settings: dict[str, Any]) -> str:
    """Of all settings that figures hang on."""
    kept = {key: value for key, value in settings.items() if key not in ("memory", "checkpoint_minutes")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _remove_files(folder: Path, names: set[str]) -> None:
    """Remove these files of a folder, and it, if it is empty then. Raises OSError."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _table(path: Path) -> pa.Table:
    with open_plain(path) as file:
        return pq.read_table(file)
