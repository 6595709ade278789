"""A run of `verify ppl --only` in its folder: begun or gone on with, kept if it is cut off, reported."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from verify.kernels.said import visible
from verify.machine.environment import describe
from verify.machine.exits import EXIT_INTERRUPTED
from verify.ppl.only import OnlyListener, OnlyPass, only_rows, run_only
from verify.ppl.only_folder import COMMAND, OnlyFolder
from verify.ppl.resuming import runs_code
from verify.ppl.runfolder import RESULT


class OnlyScreen(OnlyListener, Protocol):
    """A listener that is also told how a run ends."""

    def stop(self) -> None:
        """Nothing goes on any more."""

    def ended(self, passes: Sequence[OnlyPass], rows: Sequence[Mapping[str, Any]]) -> None:
        """What was found."""

    def tables_and_report(self, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
        """The tables that were asked for, and where the report lies."""


def run_whole_only(
    folder: OnlyFolder, screen: OnlyScreen, load_writer: Callable[[], Callable[[Path], object]]
) -> dict[str, Any]:
    """Measure, and leave the folder as a reader finds it; the record, as `--json` prints it.

    load_writer: loads what writes a folder's reports, and returns it. Raises UsageError and what a run
    raises.
    """
    settings, content = folder.settings, {}
    try:
        try:
            passes, interrupted = run_only(settings, screen, folder)
        finally:
            screen.stop()
        content = _record(folder, passes, interrupted=interrupted)
        rows, notes = content["rows"], content["notes"]
        screen.ended(passes, rows)
        for note in notes:
            screen.notice(note)
        if rows:
            run = folder.begin()
            run.write_json(RESULT, content)
            load_writer()(run.path)
            if not interrupted:
                run.finish()
            run.release()
            screen.tables_and_report(rows, run.path)
    except KeyboardInterrupt:
        # While results were written: groups are there still.
        content = content or _record(folder, [], interrupted=True)
        content["exit_code"] = EXIT_INTERRUPTED
    if content["exit_code"] == EXIT_INTERRUPTED:
        print(f"verify: interrupted{_way_on(folder)}", file=sys.stderr)
    return content


def _record(folder: OnlyFolder, passes: Sequence[OnlyPass], *, interrupted: bool) -> dict[str, Any]:
    rows = only_rows(passes)
    cut = [row for row in rows if row["windows"] < row["windows_asked"]]
    return {
        "schema": 1,
        "command": COMMAND,
        "exit_code": EXIT_INTERRUPTED if interrupted else 0,
        "settings": asdict(folder.settings),
        "notes": [
            f"interrupted: {row['windows']} of {row['windows_asked']} windows are told of" for row in cut
        ],
        "rows": rows,
        "environment": describe(folder.settings.device),
        "again": folder.again,
    }


def _way_on(folder: OnlyFolder) -> str:
    """How to go on with what is kept; nothing where nothing is."""
    if folder.run is None:
        return ""
    words = ["verify", "ppl", "--resume", str(folder.run.path)]
    words += ["--only", folder.settings.kernel] if runs_code(folder.settings.kernel) else []
    return (
        f"; finished windows are kept in {visible(str(folder.run.path))}, go on with:"
        f" {visible(shlex.join(words))}"
    )
