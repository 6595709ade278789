"""The folder of `verify ppl --only`: each finished group of windows is kept, and an interrupted run goes on.

    settings.json                     what was asked
    groups/000-00032.parquet          pass 0 (a model on a text), windows 32 ..: nll and top1 of scored tokens
    run.json  report.md  report.html

A folder may be a stranger's, as `verify.ppl.resuming` says: a kernel that runs somebody's file is named again
by who goes on, and a group counts only where model, text and kernel are those that it was measured with.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from verify.arms.records import SCHEMA
from verify.machine.errors import UsageError
from verify.machine.files import read_json
from verify.machine.records import record_from_json
from verify.ppl.only import OnlyGroup, OnlySettings
from verify.ppl.resuming import check_kernel, go_to, kernel_mark, runs_code, where_begun
from verify.ppl.runfolder import SETTINGS, RunFolder

COMMAND = "ppl-only"


def is_of_only(folder: Path) -> bool:
    """Whether a folder to go on with is one of `--only`, by what it says of itself."""
    try:
        found = read_json(folder / SETTINGS)
    except (OSError, ValueError):
        # Said where it is read to be used.
        return False
    return isinstance(found, dict) and found.get("command") == COMMAND


class OnlyFolder:
    """Begun when the first group is finished: what is refused, or cut off before, leaves nothing.

    out: the folder, None for one with the time in its name; again: the command that was typed.
    """

    def __init__(
        self, settings: OnlySettings, *, out: Path | None, again: str, run: RunFolder | None = None
    ) -> None:
        self.settings, self.again, self.run = settings, again, run
        self._out = out

    @classmethod
    def reopen(cls, resume: Path, *, kernel: str | None, memory: int | None) -> OnlyFolder:
        """The folder of a run that is gone on with; goes to where it was begun.

        kernel: as the command line names it again, if it does; memory: instead of the run's own. Raises
        UsageError.
        """
        run = RunFolder.reopen(resume)
        stored = run.read_settings(COMMAND)
        where = f"--resume {resume}: {SETTINGS}"
        settings = record_from_json(OnlySettings, stored["settings"], where)
        again = stored["identity"].get("again")
        if kernel is None and runs_code(settings.kernel):
            raise UsageError(
                f"--resume {resume}: this run runs {settings.kernel}, which a folder alone cannot ask for: if"
                f" you mean it, name it again with --only"
            )
        if kernel is not None and kernel != settings.kernel:
            raise UsageError(f"--resume {resume}: that run is of --only {settings.kernel}, got {kernel}")
        begun_in = where_begun(stored, resume)
        if kernel is not None:
            check_kernel(kernel, resume=resume, begun_in=begun_in, kernels=stored["identity"].get("kernels"))
        run = run.absolute()
        go_to(begun_in, resume)
        if memory is not None:
            settings = replace(settings, memory=memory)
        return cls(settings, out=None, again=again if isinstance(again, str) else "", run=run)

    def begin(self) -> RunFolder:
        """The folder, which is there from now on."""
        if self.run is None:
            self.run = RunFolder.begin(self._out, "ppl")
            self.run.write_settings(
                {
                    "schema": SCHEMA,
                    "command": COMMAND,
                    "settings": asdict(self.settings),
                    "identity": {"again": self.again, "kernels": [kernel_mark(self.settings.kernel)]},
                    "folder": str(Path.cwd()),
                }
            )
        return self.run

    def save(self, number: int, first: int, key: str, group: OnlyGroup) -> None:
        """Keep a finished group: of pass `number`, its windows from `first` on. Raises UsageError."""
        content: dict[str, Any] = {"nll": group.nll.ravel(), "top1": group.top1.ravel()}
        self.begin().save_part(number, first, pa.table(content).replace_schema_metadata({"key": key}))

    def finished(self, number: int, key: str, scored: int) -> dict[int, OnlyGroup]:
        """Groups of a pass, by their first windows. scored: tokens a window. Raises UsageError."""
        found = {}
        for first, table in self.run.parts(number) if self.run is not None else ():
            try:
                if (table.schema.metadata or {}).get(b"key") != key.encode():
                    raise ValueError("is of another model, text or kernel")
                nll, top1 = (table.column(name).to_numpy() for name in ("nll", "top1"))
                if nll.dtype != np.float64 or not len(nll) or len(nll) % scored:
                    raise ValueError(f"expected {scored} numbers a window")
                found[first] = OnlyGroup(nll.reshape(-1, scored), top1.reshape(-1, scored))
            except (KeyError, ValueError) as error:
                assert self.run is not None
                raise UsageError(
                    f"--resume {self.run.path}: windows from {first} of pass {number + 1}: {error}: remove"
                    " groups/, and they are run again"
                ) from None
        return found
