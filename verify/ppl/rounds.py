"""A run, round by round: each rank runs a group of the windows that are still missing, rank 0 keeps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from verify.arms.arm import Arm
from verify.data import Windows
from verify.machine.errors import UsageError
from verify.machine.ranks import Ranks
from verify.model.runner import LayerCall, Progress, Runner
from verify.ppl.checkpoint import Checkpoints
from verify.ppl.engine_logits import LogitsFiles
from verify.ppl.frozen import Fault
from verify.ppl.grouping import Grouping, uncovered
from verify.ppl.groups import GroupResult, run_group
from verify.ppl.runfolder import RunFolder


class Watcher(Protocol):
    """Told how the rounds go on. `taken_in`: a group is finished, or was found finished."""

    def notice(self, text: str) -> None: ...
    def progress(self, first: int, last: int, windows: int) -> Progress: ...
    def taken_in(self, first: int, result: GroupResult) -> None: ...


class Rounds:
    """The groups of one run.

    folder: where rank 0 keeps finished groups, None in other ranks; capture, prompt, faults, logits_files,
    measured: see `run_group`.
    checkpoint_seconds: between two checkpoints of a group; ranks that share their reading keep none.
    `grouping` is the one at hand: a device without memory makes groups smaller.
    """

    def __init__(
        self,
        runner: Runner,
        windows: Windows,
        arms: Sequence[Arm],
        grouping: Grouping,
        *,
        folder: RunFolder | None,
        ranks: Ranks,
        seed: int,
        capture: Callable[[LayerCall], None] | None = None,
        prompt: Arm | None = None,
        faults: Mapping[str, Fault] | None = None,
        logits_files: LogitsFiles | None = None,
        measured: int = 0,
        checkpoint_seconds: float = math.inf,
    ) -> None:
        self.runner, self.windows, self.arms, self.grouping = runner, windows, arms, grouping
        self.folder, self.ranks, self.seed, self.capture = folder, ranks, seed, capture
        self.prompt, self.faults, self.logits_files = prompt, faults, logits_files
        self.measured, self.checkpoint_seconds = measured, checkpoint_seconds

    def run(self, watcher: Watcher) -> list[GroupResult]:
        """All groups, in order, in rank 0; other ranks get none."""
        total, folder, ranks = self.windows.n_windows, self.folder, self.ranks
        results: dict[int, GroupResult] = {}
        for first in folder.finished_groups() if folder else ():
            assert folder is not None
            results[first] = folder.load_group(first)
            watcher.taken_in(first, results[first])
        while left := ranks.of_leader(
            uncovered({first: len(r.windows) for first, r in results.items()}, total)
        ):
            # No rank shall be idle while another has two windows to run.
            size = min(self.grouping.windows, -(-sum(map(len, left)) // ranks.size))
            chunks = [part[at : at + size] for part in left for at in range(0, len(part), size)]
            chosen = chunks[ranks.rank] if ranks.rank < len(chunks) else range(total, total)
            found = self._group(chosen, watcher)
            for result in ranks.everyones(found):
                if result is not None and len(result.windows):
                    first = result.windows.start
                    if folder is not None:
                        folder.save_group(first, result)
                        watcher.taken_in(first, result)
                    results[first] = result
            self._pass_on_failures()
        return [results[first] for first in sorted(results)] if ranks.leads else []

    def _group(self, chosen: range, watcher: Watcher) -> GroupResult | None:
        """The group's result; None where the device had too little memory, and groups are smaller now."""
        checkpoints, begin = None, None
        if self.folder is not None and self.ranks.size == 1:
            checkpoints = Checkpoints(
                self.folder.save_checkpoint, seconds=self.checkpoint_seconds, notice=watcher.notice
            )
            begin = self.folder.load_checkpoint(chosen.start, self.runner.device)
        if begin is not None:
            chosen = begin.windows
            watcher.notice(
                f"windows {chosen.start + 1} to {chosen.stop} go on after layer {begin.layers - 1}"
            )
        try:
            return run_group(
                self.runner,
                self.windows,
                chosen,
                self.arms,
                seed=self.seed,
                capture=self.capture,
                prompt=self.prompt,
                faults=self.faults,
                progress=watcher.progress(chosen.start, chosen.stop, self.windows.n_windows),
                logits_files=self.logits_files,
                measured=self.measured,
                checkpoints=checkpoints,
                begin=begin,
            )
        except torch.cuda.OutOfMemoryError as error:
            # Ranks that share their reading cannot go back alone.
            if len(chosen) == 1 or self.ranks.size > 1:
                said = " ".join(str(error).split())[:200]
                raise UsageError(
                    f"{self.runner.device}: too little memory for {len(chosen)} windows ({said}); expected a"
                    " smaller -c, a smaller --memory, or another --device"
                ) from None
        self.grouping = self.grouping.halved()
        if self.folder is not None:
            self.folder.drop_checkpoint(chosen.start)
        torch.cuda.empty_cache()
        watcher.notice(
            f"{self.runner.device} has too little memory for {len(chosen)} windows: groups of"
            f" {self.grouping.windows} from here on"
        )
        return None

    def _pass_on_failures(self) -> None:
        """An arm that failed in one rank does not run again in any."""
        everyones = self.ranks.everyones(
            {a.name: (a.findings.failure, a.findings.failure_place) for a in self.arms if a.failed}
        )
        for arm in self.arms:
            for failed in everyones:
                if arm.name in failed and not arm.failed:
                    arm.findings.failure, arm.findings.failure_place = failed[arm.name]
