"""A finished run as its folder holds it: what every report is made from, now or later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from verify.arms.records import OWN, check_schema
from verify.gen.record import GenRun
from verify.kernels.said import all_visible
from verify.machine.command_line import command_line
from verify.machine.errors import UsageError
from verify.machine.files import is_plain_file, open_plain, read_json
from verify.machine.records import record_from_json
from verify.ppl.record import PplRun, ppl_run_from_json
from verify.ppl.runfolder import RESULT, SETTINGS
from verify.ppl.settings import PplSettings

# In the order of its command line.
_GEN_SETTINGS = (
    *("n_predict", "draft", "baseline", "candidates", "cache_type", "device", "split_mode", "gpus", "margin"),
    *("allow_same", "min_coverage", "seed", "ignore_eos"),
)


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run's folder and, where the run left them, tokens.parquet and layers.parquet."""

    folder: Path
    tokens: pa.Table | None = None
    layers: pa.Table | None = None
    # Rows of each table that are an arm's, once they were looked for.
    _rows: dict[tuple[str, str], pa.ChunkedArray] = field(default_factory=dict, repr=False, compare=False)

    def column(self, arm: str, name: str) -> np.ndarray:
        """A column of tokens.parquet for one arm, in the order of the text; empty where it has none."""
        return self._of_arm("tokens", arm, name)

    def both(self, arm: str, other: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of two arms over the windows that both ran."""
        a, b = self.column(arm, "window"), self.column(other, "window")
        return self.column(arm, name)[np.isin(a, b)], self.column(other, name)[np.isin(b, a)]

    def layer_column(self, arm: str, name: str) -> np.ndarray:
        """The same of layers.parquet."""
        return self._of_arm("layers", arm, name)

    def _of_arm(self, which: str, arm: str, name: str) -> np.ndarray:
        table: pa.Table | None = getattr(self, which)
        if table is None or name not in table.column_names:
            return np.empty(0)
        if (which, arm) not in self._rows:
            self._rows[which, arm] = pc.equal(table["arm"].cast(pa.string()), arm)
        found: np.ndarray = table[name].filter(self._rows[which, arm]).to_numpy()
        return found


@dataclass(frozen=True, kw_only=True)
class StoredPpl(StoredRun):
    """A run of `verify ppl`, and its alone.parquet."""

    run: PplRun
    alone: pa.Table | None = None


@dataclass(frozen=True, kw_only=True)
class StoredGen(StoredRun):
    """A run of `verify gen`."""

    run: GenRun


@dataclass(frozen=True, kw_only=True)
class StoredPage:
    """A run of a command whose page is made from run.json alone."""

    folder: Path
    run: Mapping[str, Any]  # as it was written; a stranger's may hold anything


# Commands whose pages are made from run.json alone.
OF_JSON = ("ppl-only", "diff", "props", "judge", "identify", "kld", "sweep")


def load_run(folder: Path) -> StoredPpl | StoredGen | StoredPage:
    """A finished run of any command that leaves a folder, of this schema or an earlier one.

    Raises UsageError, naming folder, file and field, where there is no such run to read.
    """
    path = folder / RESULT
    if not is_plain_file(path):
        if is_plain_file(folder / SETTINGS):
            raise UsageError(f"{folder}: that run is not finished, go on with: verify ppl --resume {folder}")
        raise UsageError(f"{folder}: no {RESULT} there, expected the folder of a run")
    try:
        # A stranger's, it may be: no text in it steers a terminal or a page.
        stored = all_visible(read_json(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    if isinstance(stored, dict) and stored.get("command") in OF_JSON:
        return StoredPage(folder=folder, run=stored)
    if not isinstance(stored, dict) or not {"command", "verdict", "settings"} <= stored.keys():
        raise UsageError(f"{path}: expected an object with command, verdict and settings")
    tokens, layers = _table(folder / "tokens.parquet"), _table(folder / "layers.parquet")
    if stored["command"] not in ("ppl", "gen"):
        raise UsageError(
            f"{folder}: a run of verify {stored['command']}, expected one of: ppl, gen, {', '.join(OF_JSON)}"
        )
    check_schema(stored, str(path))
    if stored["command"] == "ppl":
        run = ppl_run_from_json(stored, str(path))
        alone = _table(folder / "alone.parquet")
        return StoredPpl(folder=folder, run=run, tokens=tokens, layers=layers, alone=alone)
    written = record_from_json(GenRun, stored, str(path))
    return StoredGen(folder=folder, run=written, tokens=tokens, layers=layers)


def _table(path: Path) -> pa.Table | None:
    if not is_plain_file(path):
        return None
    try:
        with open_plain(path) as file:
            return pq.read_table(file)
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise UsageError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def ppl_command(run: PplRun) -> str:
    """The command that makes a run of `verify ppl` again: defaults are left out, but for the device, whose
    default is the machine's."""
    defaults = {f.name: f.default for f in fields(PplSettings) if f.name != "device"}
    asked_in_form = run.settings.get("path") == "several" or any(
        run.settings.get(name, defaults[name]) != defaults[name] for name in ("pages", "sequences")
    )
    if asked_in_form:
        defaults["baseline"] = OWN
    # Which baseline each candidate has follows from what it returns.
    asked = {name: value for name, value in run.settings.items() if name != "baselines"}
    return command_line(["ppl"], asked, defaults=defaults)


def gen_command(run: GenRun) -> str:
    """The command that makes a run of `verify gen` again."""
    settings = run.settings
    given = "prompt_file" if settings.get("prompt_file") else "prompt"
    asked = {name: settings.get(name) for name in ("model", given, *_GEN_SETTINGS)}
    return command_line(["gen"], asked, defaults={"split_mode": "layer", "gpus": 1, "draft": 0})
