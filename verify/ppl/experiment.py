"""`verify ppl`: from a model file and a text to a verdict, a group of windows at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from verify.arms.sample import Sample
from verify.diff.captured import capture_to
from verify.kernels.eager import EagerKernel
from verify.kernels.exact import ExactKernel
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.oracle_products import multiplying
from verify.machine import environment
from verify.machine.errors import UsageError
from verify.machine.ranks import Ranks
from verify.model.layer_call import LayerCall
from verify.model.runner import COMPUTE_TYPES, Runner
from verify.ppl.conclusions import conclude
from verify.ppl.evidence import Scores
from verify.ppl.evidence.foresight import deviation_so_far, foresight
from verify.ppl.grouping import Grouping, group_windows
from verify.ppl.groups import GroupJob, GroupResult, join_groups
from verify.ppl.headroom import headroom_to
from verify.ppl.listener import Listener
from verify.ppl.measuring import is_measured
from verify.ppl.perplexity import running_perplexity
from verify.ppl.preparation import Preparation
from verify.ppl.reasking import OnceMore
from verify.ppl.record import PplRun, SpeedRecord
from verify.ppl.rounds import Rounds
from verify.ppl.runfolder import RunFolder
from verify.ppl.settings import PplSettings

# Processes of a run on a CPU at most, and memory that each may come to have beside the first; models of a
# larger file are decoded once for all windows.
_MOST_PROCESSES, _MEMORY_A_PROCESS, _LARGEST_SHARED = 16, 2 << 30, 1 << 30


class Outcome(NamedTuple):
    """All that a run found: its record, and the tables of its folder."""

    run: PplRun
    joined: GroupResult


class Experiment:
    """One run of `verify ppl`: its groups and what is concluded. What can be refused is refused here, before
    anything is computed."""

    def __init__(self, settings: PplSettings, listener: Listener, ranks: Ranks | None = None) -> None:
        self.listener, self.ranks = listener, ranks or Ranks()
        # Seconds of the wall, from the start of the process, at which stages ended.
        self.ended = {"loading": environment.process_seconds()}
        self.prepared = Preparation(settings, listener, self.ranks)
        # The folder that holds what was seen of the headroom.
        self._rooms: Path | None = None
        self._nll: list[np.ndarray] = []
        self._corrected = False
        self.sample = Sample(0)
        self.grouping = Grouping(1, 0)
        # Shapes of products that depend on where a row lies.
        self._moved: list[tuple[int, ...]] = []
        # Groups that are run at once, each in a process.
        self._side_by_side = 1

    @property
    def settings(self) -> PplSettings:
        """With the baseline that each candidate has."""
        return self.prepared.settings

    def close(self) -> None:
        self.prepared.close()

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it goes on with."""
        return self.prepared.identity()

    def run(self, folder: RunFolder | None, meanwhile: Callable[[], object] | None = None) -> Outcome | None:
        """Run every group that the folder does not hold, and draw the conclusions.

        Ranks other than 0 have no folder, and draw none. A KeyboardInterrupt passes through; finished groups
        are in the folder then. meanwhile: called once, in a thread, while groups run.
        """
        with multiplying(self.prepared.device, self.prepared.settings.oracle):
            return self._run(folder, meanwhile)

    def _run(self, folder: RunFolder | None, meanwhile: Callable[[], object] | None) -> Outcome | None:
        prepared, settings = self.prepared, self.prepared.settings
        leads = self.ranks.leads
        hooks = [capture_to(folder.path, prepared.captured)] if prepared.captured and folder else []
        if settings.headroom and folder is not None:
            self._rooms = folder.path
            hooks.append(headroom_to(folder.path, prepared.ordering))
        runner = Runner(
            prepared.architecture,
            device=prepared.device,
            attention_type=settings.cache_type,
            share=self.ranks.share(),
            compute=settings.compute,
            gpus=settings.gpus,
            side_by_side=settings.sequences if settings.sequences > 1 else 0,
        )
        grouping = min(self.ranks.everyones(self._grouping(runner)))
        if prepared.logits_files and self.ranks.size > 1:
            raise UsageError("--save-logits, --against: expected one process, logits are written in order")
        self.sample = Sample(
            prepared.windows.n_windows,
            measured=settings.measured,
            at_once=runner.tiling(settings.n_ctx, settings.score_last).windows,
        )
        self.ended["preparing"] = environment.process_seconds()
        prepared.logits_files.begin(resume=bool(folder and folder.finished_groups()))
        self.listener.started(
            prepared.model,
            prepared.corpus_record(len(self.sample)),
            prepared.tensor_parallel,
            sorted(prepared.notes | self._measuring_notes()),
        )
        job = GroupJob(
            runner=runner,
            windows=prepared.windows,
            arms=prepared.arms,
            seed=settings.seed,
            prompt=prepared.prompt,
            faults={fault.name: fault.fault for fault in prepared.faults},
            capture=_each_of(hooks) if hooks else None,
            logits_files=prepared.logits_files or None,
            measured=settings.measured,
            any_says=self.ranks.any,
        )
        self._side_by_side = 1 if hooks else self._processes(runner)
        rounds = Rounds(
            job,
            grouping,
            folder=folder,
            ranks=self.ranks,
            listener=self.listener,
            group_done=self._group_done,
            checkpoint_seconds=60 * settings.checkpoint_minutes,
            processes=self._side_by_side,
            meanwhile=meanwhile,
        )
        results = rounds.run()
        joined = join_groups(results) if leads else None
        again = OnceMore(prepared, runner, self.sample, self.listener, alone=self.ranks.size == 1)
        if joined is not None:
            again.ask(joined)
        runner.stream.close()
        self.ended["groups"] = environment.process_seconds()
        self.grouping = rounds.grouping
        self._moved = [shape for shape, same in runner.products.checked.items() if not same]
        if joined is None:
            return None
        run = conclude(
            prepared,
            joined,
            again,
            measuring_notes=self._measuring_notes(),
            measured_windows=len(self.sample),
            rooms=self._rooms,
            speed=partial(self._speed_record, joined),
        )
        return Outcome(run, joined)

    def _measuring_notes(self) -> set[str]:
        """What a reader of the verdict must know about how kernels were measured."""
        notes = set()
        if len(self.sample) < self.prepared.windows.n_windows:
            notes.add(
                f"kernels were measured on {len(self.sample)} of {self.prepared.windows.n_windows} windows:"
                " distance, casts frozen and floor are theirs"
            )
        if self._moved:
            notes.add(
                f"products of {len(self._moved)} shapes give a row other bits in another place here: results"
                " may depend on the size of the groups"
            )
        return notes

    def _correct_foresight(self, result: GroupResult) -> None:
        """Say once what the first group's spread makes of it, where more groups follow."""
        pair = next((arm for arm in self.prepared.arms if arm.role == "candidate" and arm.reference), None)
        together = len(result.windows) * self._side_by_side
        if self._corrected or pair is None or together >= self.prepared.windows.n_windows:
            return
        scores = Scores(result, self.prepared.windows.scored_per_window)
        deviation = deviation_so_far(scores, pair.name, pair.reference or "")
        if deviation is not None:
            self._corrected = True
            corrected = foresight(len(self.sample), self.prepared.windows.scored_per_window, deviation)
            self.listener.notice(f"by the first group, {corrected}")

    def _grouping(self, runner: Runner) -> Grouping:
        prepared, settings = self.prepared, self.prepared.settings
        n_ctx, width = settings.n_ctx, prepared.architecture.sizes.width
        return group_windows(
            windows=prepared.windows.n_windows,
            at_once=runner.tiling(n_ctx, settings.score_last).windows,
            n_ctx=n_ctx,
            state_bytes=(len(prepared.arms) + sum(map(is_measured, prepared.arms)) + len(prepared.faults))
            * n_ctx
            * width
            * COMPUTE_TYPES[settings.compute].itemsize,
            model_bytes=prepared.file.n_bytes,
            memory=settings.memory,
            device=prepared.device,
        )

    def _processes(self, runner: Runner) -> int:
        """How many may run groups side by side, as many as torch has threads: threads that share a product
        wait for each other. One where something is kept from group to group, where a kernel is not wholly in
        this process, or where decoding the weights again is not cheap."""
        prepared = self.prepared
        if self.ranks.size > 1:
            return 1
        threads, windows = torch.get_num_threads(), prepared.windows.n_windows
        kernels = [arm.kernel for arm in prepared.arms if arm.kernel is not None]
        if prepared.device.type != "cpu" or not hasattr(os, "fork") or prepared.logits_files:
            return 1
        if not all(type(kernel) in (EagerKernel, ExactKernel, FlashKernel) for kernel in kernels):
            return 1
        if prepared.settings.memory is not None or prepared.file.n_bytes > _LARGEST_SHARED:
            return 1
        # Groups begin where windows that are computed together do.
        if runner.tiling(prepared.settings.n_ctx, prepared.settings.score_last).windows > 1:
            return 1
        fitting = environment.available_memory() // _MEMORY_A_PROCESS
        processes = max(min(threads, windows, fitting, _MOST_PROCESSES), 1)
        # A few of them with one thread each would leave most processors idle.
        return processes if 2 * processes > threads else 1

    def _group_done(self, first: int, result: GroupResult) -> None:
        """A finished group's part of the running perplexity, if all before it is there."""
        baseline = next(arm.name for arm in self.prepared.arms if arm.role == "baseline")
        nll = Scores(result, self.prepared.windows.scored_per_window).column(baseline, "nll")
        self._correct_foresight(result)
        if first == sum(map(len, self._nll)) and len(nll):
            self._nll.append(nll)
            self.listener.windows_done(first, running_perplexity(np.concatenate(self._nll))[first:])

    def _speed_record(self, joined: GroupResult) -> SpeedRecord:
        """Of everything up to now: the last thing that is recorded."""
        products = joined.seconds.get("products", 0.0)
        self.ended["conclusions"] = environment.process_seconds()
        return SpeedRecord(
            seconds=joined.seconds,
            product_flop=joined.product_flop,
            product_flop_per_s=joined.product_flop / products if products else None,
            anonymous_bytes=joined.anonymous_bytes,
            group_windows=min(self.grouping.windows, -(-len(joined.windows) // self._side_by_side)),
            stages_ended_at_s=self.ended,
            groups=joined.groups,
            read_bytes=joined.read_bytes.total(),
            processes=self._side_by_side,
        )


def _each_of(hooks: Sequence[Callable[[LayerCall], None]]) -> Callable[[LayerCall], None]:
    def call_each(call: LayerCall) -> None:
        for hook in hooks:
            hook(call)

    return call_each
