"""A run, round by round: each rank runs a group of the windows that are still missing, rank 0 keeps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import Thread

import torch

from verify.arms.arm import Findings
from verify.machine.errors import UsageError
from verify.machine.processes import at_once
from verify.machine.ranks import Ranks
from verify.ppl.checkpoint import Checkpoints
from verify.ppl.grouping import Grouping, uncovered
from verify.ppl.groups import GroupJob, GroupResult, check_group, run_group
from verify.ppl.listener import Listener
from verify.ppl.runfolder import RunFolder


class Rounds:
    """The groups of one run.

    folder: where rank 0 keeps finished groups, None in other ranks. listener: hears of progress and notices;
    group_done: called in rank 0 with the first window of each group that is finished, or was found finished.
    checkpoint_seconds: between two checkpoints of a group; ranks that share their reading, and processes,
    keep none. processes: groups that a rank alone runs side by side, each in a process forked for it.
    meanwhile: called once, in a thread of this process, while groups run.
    `grouping` is the one at hand: a device without memory makes groups smaller.
    """

    def __init__(
        self,
        job: GroupJob,
        grouping: Grouping,
        *,
        folder: RunFolder | None,
        ranks: Ranks,
        listener: Listener,
        group_done: Callable[[int, GroupResult], None],
        checkpoint_seconds: float = math.inf,
        processes: int = 1,
        meanwhile: Callable[[], object] | None = None,
    ) -> None:
        self.job, self.grouping, self.folder, self.ranks = job, grouping, folder, ranks
        self.listener, self.group_done, self.checkpoint_seconds = listener, group_done, checkpoint_seconds
        self.processes = processes if ranks.size == 1 else 1
        self.meanwhile = meanwhile
        self._thread: Thread | None = None
        # Arms that failed, by name: they do not run again.
        self._failed: dict[str, Findings] = {}

    def run(self) -> list[GroupResult]:
        """All groups, in order, in rank 0; other ranks get none."""
        total, folder, ranks = self.job.windows.n_windows, self.folder, self.ranks
        results: dict[int, GroupResult] = {}
        for first in folder.finished_groups() if folder else ():
            assert folder is not None
            check = partial(check_group, first=first, arms=self.job.arms, windows=self.job.windows)
            results[first] = folder.load_group(first, check)
            self._note_failures(results[first].findings)
            self.group_done(first, results[first])
        while left := ranks.of_leader(
            uncovered({first: len(r.windows) for first, r in results.items()}, total)
        ):
            # No rank shall be idle while another has two windows to run.
            size = min(self.grouping.windows, -(-sum(map(len, left)) // (ranks.size * self.processes)))
            chunks = [part[at : at + size] for part in left for at in range(0, len(part), size)]
            if self.processes > 1 and not (folder and folder.has_checkpoint(chunks[0].start)):
                found: list[GroupResult | None] = list(self._side_by_side(chunks[: self.processes]))
            else:
                chosen = chunks[ranks.rank] if ranks.rank < len(chunks) else range(total, total)
                own = self._group(chosen)
                if own is not None:
                    self._note_failures(own.findings)
                found = ranks.everyones(own)
            for result in found:
                if result is not None and len(result.windows):
                    first = result.windows.start
                    if folder is not None:
                        folder.save_group(first, result)
                        self.group_done(first, result)
                    results[first] = result
            for failed in ranks.everyones(self._failed):
                self._note_failures(failed)
        return [results[first] for first in sorted(results)] if ranks.leads else []

    def _note_failures(self, findings: Mapping[str, Findings]) -> None:
        """An arm that failed in one group, of any rank, runs in no other. Its first failure counts."""
        for name, of_arm in findings.items():
            if of_arm.failed:
                self._failed.setdefault(name, of_arm.of_failure())

    def _side_by_side(self, chunks: Sequence[range]) -> list[GroupResult]:
        """A group in each process. What is told of the first stands for all: they are of one size."""
        total = self.job.windows.n_windows
        progress = self.listener.progress(chunks[0].start, chunks[-1].stop, total)
        run = partial(run_group, self.job, failed=self._failed)

        def here() -> GroupResult:
            self._begin_meanwhile()
            return run(chunks[0], progress=progress)

        if self._thread is not None:
            # A process that is forked while a module is loaded could never load it.
            self._thread.join()
        asked: list[Callable[[], GroupResult]] = [here]
        asked += [partial(_elsewhere, self.job, partial(run, chosen)) for chosen in chunks[1:]]
        results = at_once(asked)
        for result in results:
            self._note_failures(result.findings)
        return results

    def _begin_meanwhile(self) -> None:
        if self.meanwhile is not None and self._thread is None:
            self._thread = Thread(target=self.meanwhile, daemon=True)
            self._thread.start()

    def _group(self, chosen: range) -> GroupResult | None:
        """The group's result; None where the device had too little memory, and groups are smaller now."""
        self._begin_meanwhile()
        checkpoints, begin, device = None, None, self.job.runner.device
        if self.folder is not None and self.ranks.size == 1:
            checkpoints = Checkpoints(
                self.folder.save_checkpoint, seconds=self.checkpoint_seconds, notice=self.listener.notice
            )
            begin = self.folder.load_checkpoint(chosen.start, device)
        if begin is not None:
            chosen = begin.windows
            self.listener.notice(
                f"windows {chosen.start + 1} to {chosen.stop} go on after layer {begin.layers - 1}"
            )
        try:
            return run_group(
                self.job,
                chosen,
                failed=self._failed,
                progress=self.listener.progress(chosen.start, chosen.stop, self.job.windows.n_windows),
                checkpoints=checkpoints,
                begin=begin,
            )
        except torch.cuda.OutOfMemoryError as error:
            # Ranks that share their reading cannot go back alone.
            if len(chosen) == 1 or self.ranks.size > 1:
                why = " ".join(str(error).split())[:200]
                raise UsageError(
                    f"{device}: too little memory for {len(chosen)} windows ({why}); expected a"
                    " smaller -c, a smaller --memory, or another --device"
                ) from None
        self.grouping = self.grouping.halved()
        if self.folder is not None:
            self.folder.drop_checkpoint(chosen.start)
        torch.cuda.empty_cache()
        self.listener.notice(
            f"{device} has too little memory for {len(chosen)} windows: groups of"
            f" {self.grouping.windows} from here on"
        )
        return None


def _elsewhere(job: GroupJob, run: Callable[[], GroupResult]) -> GroupResult:
    """A group in a process that was forked for it."""
    job.runner.stream.begin_anew()
    return run()
