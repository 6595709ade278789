"""A finished run as its folder holds it: what every report is made from, now or later."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from verify.machine.errors import UsageError
from verify.ppl.runfolder import RESULT, SETTINGS
from verify.ppl.settings import PplSettings

_LETTERS = {"model": "-m", "file": "-f", "n_ctx": "-c", "candidates": "--candidate"}


@dataclass(frozen=True)
class RunRecord:
    """run.json and, where the run left them, tokens.parquet and layers.parquet."""

    folder: Path
    run: dict[str, Any]
    tokens: pa.Table | None = None
    layers: pa.Table | None = None

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Raises UsageError, naming the folder or file, where there is no finished run to read."""
        path = folder / RESULT
        if not path.is_file():
            if (folder / SETTINGS).is_file():
                raise UsageError(
                    f"{folder}: that run is not finished, go on with: verify ppl --resume {folder}"
                )
            raise UsageError(f"{folder}: no {RESULT} there, expected the folder of a run")
        try:
            run = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read: {error}") from None
        if not isinstance(run, dict) or not {"command", "verdict", "settings"} <= run.keys():
            raise UsageError(f"{path}: expected an object with command, verdict and settings")
        return cls(folder, run, _table(folder / "tokens.parquet"), _table(folder / "layers.parquet"))

    @property
    def arms(self) -> list[dict[str, Any]]:
        return list(self.run["arms"])

    def arm_of(self, role: str, path: str | None = None) -> str | None:
        """Name of the first arm of a role, on a path if one is given."""
        return next((a["name"] for a in self.arms if a["role"] == role and path in (None, a["path"])), None)

    def column(self, arm: str, name: str) -> np.ndarray:
        """A column of tokens.parquet for one arm, in the order of the text; empty where it has none."""
        return _of_arm(self.tokens, arm, name)

    def both(self, arm: str, other: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of two arms over the windows that both ran."""
        a, b = self.column(arm, "window"), self.column(other, "window")
        return self.column(arm, name)[np.isin(a, b)], self.column(other, name)[np.isin(b, a)]

    def layer_column(self, arm: str, name: str) -> np.ndarray:
        """The same of layers.parquet."""
        return _of_arm(self.layers, arm, name)


def _of_arm(table: pa.Table | None, arm: str, name: str) -> np.ndarray:
    if table is None or name not in table.column_names:
        return np.empty(0)
    mine = table.filter(pc.equal(table["arm"].cast(pa.string()), arm))
    found: np.ndarray = mine[name].to_numpy()
    return found


def _table(path: Path) -> pa.Table | None:
    if not path.is_file():
        return None
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


def command_line(run: dict[str, Any]) -> str:
    """The command that makes a run of `verify ppl` again, from its settings: defaults are left out, but the
    device, whose default is the machine's."""
    defaults = {f.name: f.default for f in fields(PplSettings) if f.name != "device"}
    words = ["verify", run["command"]]
    for name, value in run["settings"].items():
        several = value if isinstance(value, (list, tuple)) else [value]
        default = defaults.get(name)
        if value is None or tuple(several) == (default if isinstance(default, tuple) else (default,)):
            continue
        flag = _LETTERS.get(name, "--" + name.replace("_", "-"))
        for one in several:
            if one is True:
                words.append(flag)
            elif one is not False:
                words += [flag, shlex.quote(str(one))]
    return " ".join(words)
