"""A run of `verify ppl` in its folder: begun or gone on with, kept if it is cut off, concluded, reported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from verify.arms.records import SCHEMA
from verify.kernels.errors import MachineFailure
from verify.kernels.said import visible
from verify.machine.errors import UsageError
from verify.machine.exits import EXIT_INTERRUPTED
from verify.machine.outfile import check_writable
from verify.machine.ranks import Ranks
from verify.machine.records import as_json
from verify.model.gguf.held import ModelChanged
from verify.ppl.experiment import Experiment, Outcome
from verify.ppl.listener import Listener
from verify.ppl.record import PplRun
from verify.ppl.resuming import BegunRun, words_to_resume
from verify.ppl.runfolder import RunFolder, refuse_a_run
from verify.ppl.settings import PplSettings


class Screen(Listener, Protocol):
    """A listener that is also told how a run ends."""

    def stop(self) -> None:
        """Nothing goes on any more: a bar, or a line that grows, ends here."""

    def outcome(self, run: PplRun, folder: Path) -> None:
        """What was found, and the folder that holds it."""


class WholeRun(NamedTuple):
    """run: None where there is none: the run was interrupted, or another rank has it."""

    exit_code: int
    run: PplRun | None = None


def run_whole(
    settings: PplSettings,
    screen: Screen,
    ranks: Ranks,
    *,
    out: Path | None,
    load_writer: Callable[[], Callable[[Path], object]],
    begun: BegunRun | None = None,
) -> WholeRun:
    """Measure, conclude, and leave the folder as a reader finds it.

    out: the folder, None for one with the time in its name; load_writer: loads what writes a folder's
    reports, and returns it; begun: the run that is gone on with. Raises UsageError and what a run raises;
    where model or machine failed, that says how to go on.
    """
    if settings.save_logits is not None:
        read = [settings.model, settings.file, *settings.against]
        check_writable("--save-logits", settings.save_logits, read)
    if begun is None and out is not None and ranks.leads:
        # Before a model is fetched.
        refuse_a_run(out, groups=True)
    folder = begun.folder if begun is not None else None
    outcome: Outcome | None = None
    named = begun is not None
    experiment = Experiment(settings, screen, ranks)
    try:
        if begun is None and ranks.leads:
            folder = RunFolder.begin(out, "ppl")
        _agree_on_identity(experiment, ranks, folder, begun)
        named = True
        # What draws the report takes a second to load: it is there when the last group is.
        outcome = experiment.run(folder, None if folder is None else load_writer)
    except KeyboardInterrupt:
        screen.stop()
        if ranks.leads and not named:
            # The folder does not say yet what it is of: there is nothing to go on with.
            raise
        return _interrupted(folder, settings)
    except (ModelChanged, MachineFailure) as failed:
        if folder is None:
            raise
        _raise_with_way_on(failed, words_to_resume(folder.path, settings))
    finally:
        screen.stop()
        experiment.close()
        ranks.close()
        if folder is not None and outcome is None:
            folder.release()
    if folder is None or outcome is None:
        return WholeRun(0)
    try:
        folder.write_results(outcome.joined, as_json(outcome.run))
        load_writer()(folder.path)
    except KeyboardInterrupt:
        return _interrupted(folder, settings)
    folder.finish()
    folder.release()
    screen.outcome(outcome.run, folder.path)
    return WholeRun(outcome.run.exit_code, outcome.run)


def _interrupted(folder: RunFolder | None, settings: PplSettings) -> WholeRun:
    """Say how to go on, in the rank that has the folder."""
    if folder is not None:
        print(
            f"verify: interrupted; finished windows are kept in {visible(str(folder.path))},"
            f" go on with: {visible(words_to_resume(folder.path, settings))}",
            file=sys.stderr,
        )
    return WholeRun(EXIT_INTERRUPTED)


def _agree_on_identity(
    experiment: Experiment, ranks: Ranks, folder: RunFolder | None, begun: BegunRun | None
) -> None:
    """All ranks, and the run that is gone on with, are of the same model, text and kernels; the folder of a
    new run says which. Raises UsageError."""
    identity = experiment.identity()
    ranks.agree(identity)
    for what, value in identity.items() if begun is not None else ():
        if begun is not None and begun.identity.get(what) != value:
            raise UsageError(f"--resume {begun.named}: {what} changed since the run began")
    if folder is not None and begun is None:
        folder.write_settings(
            {
                "schema": SCHEMA,
                "command": "ppl",
                "settings": experiment.settings.to_json(),
                "identity": identity,
                "folder": str(Path.cwd()),
            }
        )


def _raise_with_way_on(failed: ModelChanged | MachineFailure, words: str) -> NoReturn:
    if isinstance(failed, ModelChanged):
        raise ModelChanged(
            f"{failed}; finished windows are kept, and go on with the model that they are of: {words}"
        ) from None
    raise MachineFailure(f"{failed}; finished windows are kept, go on with: {words}") from None
