"""Running one group of windows: what the arms computed, what was seen, and what was launched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from verify.arms.alone import TimeShare
from verify.arms.arm import Arm, ArmRunner, Findings, FirstResult, Place, Role
from verify.arms.model_health import OVERFLOWS, model_fault
from verify.arms.own_error import InPlace
from verify.arms.sample import Sample
from verify.arms.single_tokens import ALONE_SCHEMA, SingleTokens
from verify.data import Windows
from verify.kernels.trace import LaunchTrace
from verify.machine.environment import anonymous_memory
from verify.model.layer_call import LayerCall
from verify.model.logits import State
from verify.model.runner import Progress, Runner
from verify.ppl.checkpoint import Checkpoint, Checkpoints
from verify.ppl.drift import DriftSums, join_drift, position_edges
from verify.ppl.engine_logits import LogitsFiles
from verify.ppl.frozen import FrozenRunner
from verify.ppl.measuring import Fault, KernelMeasurer
from verify.ppl.record import frozen_name
from verify.ppl.scoring import Scorer, TokenScores
from verify.ppl.top1 import changed_tokens

T = TypeVar("T")
# Kind of work, among `seconds`.
SINGLE_TOKENS = "one query token a call"
TOKEN_SCHEMA = pa.schema(
    [
        ("window", pa.int32()),
        ("position", pa.int32()),
        ("n_kv", pa.int32()),
        ("token", pa.int32()),
        ("target", pa.int32()),
        ("arm", pa.string()),
        ("nll", pa.float64()),
        ("kld_to_exact", pa.float64()),
        ("kld_to_baseline", pa.float64()),
        ("top1", pa.int32()),
        ("target_logit", pa.float32()),
        ("top1_margin", pa.float32()),
    ]
)


@dataclass(kw_only=True)
class GroupResult:
    """What one group left, or several joined: all that a verdict needs, and nothing of the model."""

    tokens: pa.Table  # a row a scored token and pass
    layers: pa.Table  # a row a check in place
    top1: pa.Table  # tokens whose most likely token changed
    findings: dict[str, Findings]  # by arm
    traces: dict[str, LaunchTrace]  # by arm
    drift: dict[str, Any] = field(default_factory=dict)  # sums of squares, see `join_drift`
    seconds: dict[str, float] = field(default_factory=dict)  # by kind of work
    product_flop: float = 0.0  # operations of the weight products of all passes
    anonymous_bytes: int = 0  # the most anonymous memory seen
    windows: range = range(0)  # that it ran
    groups: int = 1  # that this is
    # A row a single token that was asked, arm and head.
    alone: pa.Table = field(default_factory=ALONE_SCHEMA.empty_table)
    left_out: int = 0  # single tokens that were not asked, for the time they take
    read_bytes: Counter[str] = field(default_factory=Counter)  # of the model's file, by tensor

    def state(self) -> dict[str, Any]:
        return {
            "findings": {name: found.to_json() for name, found in self.findings.items()},
            "traces": {name: trace.to_json() for name, trace in self.traces.items()},
            "drift": self.drift,
            "seconds": self.seconds,
            "product_flop": self.product_flop,
            "anonymous_bytes": self.anonymous_bytes,
            "windows": [self.windows.start, self.windows.stop],
            "read_bytes": self.read_bytes,
            "left_out": self.left_out,
        }

    @classmethod
    def from_state(cls, tables: Mapping[str, pa.Table], state: dict[str, Any]) -> GroupResult:
        return cls(
            **tables,
            findings={name: Findings.from_json(one) for name, one in state["findings"].items()},
            traces={name: LaunchTrace.from_json(lines) for name, lines in state["traces"].items()},
            drift=state["drift"],
            seconds=state["seconds"],
            product_flop=state["product_flop"],
            anonymous_bytes=state["anonymous_bytes"],
            windows=range(*state["windows"]),
            read_bytes=Counter(state["read_bytes"]),
            left_out=state["left_out"],
        )


@dataclass(frozen=True, kw_only=True)
class GroupJob:
    """What all groups of a run share."""

    runner: Runner  # of the model
    windows: Windows  # all of the text
    arms: Sequence[Arm]  # every one
    seed: int = 0  # of sampled rows and the floor's noise
    prompt: Arm | None = None  # runs what comes before the scored positions
    faults: Mapping[str, Fault] = field(default_factory=dict)  # planted in the first baseline, by frozen pass
    capture: Callable[[LayerCall], None] | None = None  # called with every layer's inputs of the exact arm
    logits_files: LogitsFiles | None = None  # where logits are saved, and engines' come from
    measured: int = 0  # windows on which kernels are measured and the floor runs (`Sample`), 0 for all
    # Whether any process that shares the reading of its groups says so: all of them go back, or none.
    any_says: Callable[[bool], bool] = bool

    def first_of(self, role: Role) -> str | None:
        """Name of the first arm of a role."""
        return next((arm.name for arm in self.arms if arm.role == role), None)


def check_group(result: GroupResult, first: int, arms: Sequence[Arm], windows: Windows) -> None:
    """Raises ValueError where a group that was read is not one that `run_group` left for this run: rows are
    missing, or of other windows."""
    here, names = result.windows, {arm.name for arm in arms}
    if here.start != first or here.step != 1 or not first < here.stop <= windows.n_windows:
        raise ValueError(f"is said to be windows {here.start} to {here.stop}")
    if result.tokens.schema != TOKEN_SCHEMA:
        raise ValueError("tokens.parquet has other columns")
    if set(result.findings) != names or not isinstance(result.drift.get("sums"), list):
        raise ValueError("state.json is of other arms")
    scored = windows.scored_positions
    window, position = (result.tokens[name].to_numpy() for name in ("window", "position"))
    of_arm = np.array(result.tokens["arm"].to_pylist())
    if len(window) % len(scored):
        raise ValueError("tokens.parquet lacks rows")
    # A line a window and arm.
    window, position, of_arm = (x.reshape(-1, len(scored)) for x in (window, position, of_arm))
    if (position != np.asarray(scored)).any() or (window != window[:, :1]).any():
        raise ValueError("tokens.parquet lacks rows")
    if (of_arm != of_arm[:, :1]).any() or not np.isin(window, np.asarray(here)).all():
        raise ValueError("tokens.parquet holds rows of other windows")
    for arm in arms:
        ran = sorted(window[of_arm[:, 0] == arm.name, 0])
        runs_all = arm.role in ("exact", "baseline", "control", "candidate")
        if len(set(ran)) < len(ran):
            raise ValueError(f"tokens.parquet has windows of {arm.name} twice")
        if runs_all and result.findings[arm.name].failure is None and ran != list(here):
            raise ValueError(f"tokens.parquet lacks windows of {arm.name}")


def run_group(
    job: GroupJob,
    chosen: range,
    *,
    failed: Mapping[str, Findings] | None = None,
    progress: Progress | None = None,
    checkpoints: Checkpoints | None = None,
    begin: Checkpoint | None = None,
) -> GroupResult:
    """Run the windows `chosen` through every arm, freely and with frozen casts.

    failed: failures of arms in earlier groups: those do not run again. checkpoints: where the group is kept
    between layers; begin: one of these windows to go on from.
    """
    try:
        return _GroupRun(job, chosen, failed or {}, begin).run(progress, checkpoints, begin)
    except _ControlDiffersError as found:
        # As a rule it does not, and no device need be asked at each layer whether it does. Its own outputs
        # are gone on with now; that it differed stands, should it not do so again.
        once_more = _GroupRun(job, chosen, failed or {}, begin, differed=found.differed)
        return once_more.run(progress, checkpoints, begin)


class _ControlDiffersError(Exception):
    """A control's output had other bits than its baseline's, which stood in its place. differed: where it
    had them first, by arm."""

    def __init__(self, differed: Mapping[str, Place | None]) -> None:
        super().__init__(*differed)
        self.differed = differed


class _GroupRun:
    """The passes of one group, and what is added up while they run.

    A control goes on with its baseline's outputs; `run` raises _ControlDiffersError, before there are logits,
    where they were not its own, or another rank's were not. differed: what that said of a run before; no
    control is trusted then.
    """

    def __init__(
        self,
        job: GroupJob,
        chosen: range,
        failed: Mapping[str, Findings],
        begin: Checkpoint | None,
        *,
        differed: Mapping[str, Place | None] | None = None,
    ) -> None:
        runner, windows, arms = job.runner, job.windows, job.arms
        self.job, self.chosen, self.trusting = job, chosen, differed is None
        runner.stopwatch.reset()
        runner.stream.read_bytes.clear()
        self.tokens = torch.from_numpy(windows.tokens[chosen.start : chosen.stop])
        first, rest = 0, None
        if job.prompt is not None:
            # The last token of a window is a target only: nothing needs its keys.
            self.tokens = self.tokens[:, : windows.scored_positions.stop]
            first, rest = windows.first_scored, windows.scored_per_window
        at_once = runner.tiling(self.tokens.shape[1], rest).windows
        self.sample = Sample(windows.n_windows, measured=job.measured, at_once=at_once)
        self.in_place = InPlace(self.sample, seed=job.seed, at_once=at_once)
        positions = windows.scored_positions
        self.single_tokens = SingleTokens(
            self.in_place,
            TimeShare(),
            scored=range(positions.start + 1, positions.stop + 1),
            seed=job.seed,
        )
        self.drift = DriftSums(position_edges(self.tokens.shape[1], first), runner.device)
        self.anonymous_bytes = anonymous_memory()
        # The first layer after which the exact arm's state is not finite; whether it is, by layer, as far as
        # the device has not been asked.
        self.bad_layer: int | None = None
        self._finite: list[tuple[int, torch.Tensor]] = []
        known = begin.evidence if begin is not None else {}
        outputs: dict[str, torch.Tensor] = {}
        first_results: dict[str, FirstResult] = {}

        def free(arm: Arm) -> ArmRunner:
            is_exact = arm.role == "exact"
            # The control has its baseline's bits, or the run is void.
            drifts = arm.role not in ("control", "prompt")
            findings = failed.get(arm.name, Findings()).of_failure()
            launched = None
            if known:
                findings = Findings.from_json(known["findings"][arm.name])
                launched = LaunchTrace.from_json(known["traces"].get(arm.name, []))
            trusting = self.trusting and arm.role == "control" and findings.attention_equal
            if differed is not None and arm.name in differed:
                first = findings.first_difference or differed[arm.name]
                findings = replace(findings, attention_equal=False, first_difference=first)
            return ArmRunner(
                arm,
                outputs,
                seed=job.seed,
                on_exact=self._measure if is_exact else None,
                on_call=partial(self.drift.add, exact=is_exact) if drifts else None,
                wait=arm.role == "prompt",
                first_results=first_results,
                findings=findings,
                launched=launched,
                trusting=trusting,
            )

        self.free = [free(arm) for arm in arms]
        self.prompt = free(job.prompt) if job.prompt is not None else None
        self.measurer = KernelMeasurer(
            self.free,
            self.in_place,
            single_tokens=self.single_tokens,
            first_results=first_results,
            seed=job.seed,
            faults=job.faults,
            planted_in=job.first_of("baseline") or "",
        )
        self.passes: list[ArmRunner | FrozenRunner] = [one for one in self.free if one.arm.role != "engine"]
        for one in self.measurer.runners:
            self.passes.append(FrozenRunner(frozen_name(one.name), one, self.measurer, self.drift.add))
        for one in self.free:
            if one.name == self.measurer.planted_in:
                planted = [FrozenRunner(name, one, self.measurer, self.drift.add) for name in job.faults]
                self.passes += planted
        frozen = {one.name for one in self.passes if isinstance(one, FrozenRunner)}
        self._on_sample = frozen | {arm.name for arm in arms if arm.role == "floor"}
        targets = windows.targets[chosen.start : chosen.stop].astype(np.int64)
        self.scorer = Scorer(
            exact=job.first_of("exact"),
            baseline_of=self._baseline_of(),
            targets=torch.from_numpy(targets.ravel()).to(runner.device),
        )
        if known:
            self.in_place.restore(known["in_place"])
            self.single_tokens.restore(known["alone"])
            self.drift.sums = dict(known["drift"])
            runner.stopwatch.restore(known["seconds"], known["flop"])
            runner.stream.read_bytes.update(known["read_bytes"])

    @property
    def _runners(self) -> list[ArmRunner]:
        """Of every arm, the prompt's included."""
        return [*self.free, *([self.prompt] if self.prompt is not None else [])]

    def _baseline_of(self) -> dict[str, str]:
        """Pass -> the pass that it is compared with."""
        of = {arm.name: arm.reference for arm in self.job.arms if arm.reference is not None}
        of |= {
            frozen_name(one.name): frozen_name(one.arm.reference)
            for one in self.measurer.runners
            if one.arm.reference is not None
        }
        return of | dict.fromkeys(self.job.faults, frozen_name(self.measurer.planted_in))

    def _measure(self, call: LayerCall, oracle: torch.Tensor) -> None:
        if call.window in self.sample:
            with self.job.runner.stopwatch.time("in place"):
                self.measurer.measure(call, oracle)
            with self.job.runner.stopwatch.time(SINGLE_TOKENS):
                self.measurer.ask_single_tokens(call)
        if self.job.capture is not None:
            self.job.capture(call)

    def _takes(self, name: str, window: int) -> bool:
        """Whether a pass runs a window: the floor and frozen passes run those that are measured."""
        return window in self.sample or name not in self._on_sample

    def _settle(self) -> None:
        """Ask the device for what it has seen, and wait for it."""
        for one in self.free:
            one.settle()
        if self._finite and self.bad_layer is None:
            found = torch.stack([finite for _, finite in self._finite]).tolist()
            bad = [layer for (layer, _), finite in zip(self._finite, found, strict=True) if not finite]
            self.bad_layer = bad[0] if bad else None
        self._finite.clear()

    def _look_at_controls(self) -> None:
        """Raises _ControlDiffersError where an output that was trusted was not the control's own."""
        wrongly = [one for one in self.free if one.trusted_wrongly]
        if self.trusting and self.job.any_says(bool(wrongly)):
            raise _ControlDiffersError({one.name: one.findings.first_difference for one in wrongly})

    def _evidence(self) -> dict[str, Any]:
        """What a checkpoint holds beside hidden states."""
        runner = self.job.runner
        return {
            "findings": {one.name: one.findings.to_json() for one in self._runners},
            "traces": self._traces(lambda trace: trace.to_json()),
            "in_place": self.in_place.state(),
            "alone": self.single_tokens.state(),
            "drift": self.drift.sums,
            "seconds": runner.stopwatch.seconds,
            "flop": runner.stopwatch.flop,
            "read_bytes": dict(runner.stream.read_bytes),
        }

    def run(
        self, progress: Progress | None, checkpoints: Checkpoints | None, begin: Checkpoint | None
    ) -> GroupResult:
        job, runner = self.job, self.job.runner
        exact = job.first_of("exact")

        def step(done: int, total: int) -> None:
            self.anonymous_bytes = max(self.anonymous_bytes, anonymous_memory())
            if progress:
                progress(done, total)

        def layer_done(layers: int, hidden: dict[State, torch.Tensor]) -> None:
            runner.architecture.file.check_unchanged()
            states = [x for (_, name), x in hidden.items() if name == exact]
            if states:
                self._finite.append(
                    (layers - 1, torch.stack([torch.isfinite(x).all() for x in states]).all())
                )
            if layers == runner.architecture.sizes.layers:
                self._settle()
                self._look_at_controls()
            if checkpoints is not None and checkpoints.due:
                self._settle()
                self._look_at_controls()
                checkpoints.keep(Checkpoint(self.chosen, layers, hidden, self._evidence()))

        slices = runner.run_group(
            self.tokens,
            self.passes,
            scored=job.windows.scored_positions,
            first_window=self.chosen.start,
            progress=step,
            whole_vocabulary=job.logits_files is not None,
            prompt=self.prompt,
            takes=self._takes,
            layer_done=layer_done,
            begin=(begin.layers, begin.hidden) if begin is not None else None,
        )
        for piece in slices:
            if job.logits_files is not None:
                piece = job.logits_files.pass_through(piece, self.chosen.start)
            with runner.stopwatch.time("scoring"):
                self.scorer.add(piece)
            self.anonymous_bytes = max(self.anonymous_bytes, anonymous_memory())
        self._settle()
        # Now or never: what is found is kept under the model's name.
        runner.architecture.file.check_unchanged()
        return self._result()

    def _result(self) -> GroupResult:
        job, runner, scores = self.job, self.job.runner, self.scorer.scores()
        exact, floor = job.first_of("exact"), job.first_of("floor")
        arms = [arm.name for arm in job.arms]
        names = [*arms, *(one.name for one in self.passes if one.name not in arms)]
        top1 = changed_tokens(
            self.scorer.best_two(),
            scores[floor].kld_to_exact if floor is not None and floor in scores else None,
            [arm for arm in job.arms if arm.role == "candidate"],
            exact,
            self.chosen,
            job.windows.scored_positions,
        )
        return GroupResult(
            tokens=_token_table(job.windows, self.chosen, names, scores),
            layers=self.in_place.table(),
            top1=top1,
            alone=self.single_tokens.table(),
            findings={one.name: self._findings(one, scores) for one in self.free},
            traces=self._traces(lambda trace: trace),
            drift=self.drift.to_json(),
            seconds=runner.stopwatch.seconds,
            product_flop=runner.stopwatch.flop,
            anonymous_bytes=self.anonymous_bytes,
            windows=self.chosen,
            read_bytes=Counter(runner.stream.read_bytes),
            left_out=self.single_tokens.share.left_out,
        )

    def _findings(self, one: ArmRunner, scores: Mapping[str, TokenScores]) -> Findings:
        """What came to light of an arm, its logits included."""
        findings = one.findings
        if one.name in self.scorer.logits_equal:
            findings = replace(findings, logits_equal=self.scorer.logits_equal[one.name])
        if one.arm.role == "exact" and one.name in scores and not np.isfinite(scores[one.name].nll).all():
            findings = replace(findings, model_fault=self._model_fault(findings))
        return findings

    def _model_fault(self, exact: Findings) -> str | None:
        """What is wrong with the model; None where its q, k or v alone overflow what they are rounded to."""
        fault = model_fault(self.job.runner.architecture, self.bad_layer)
        place = exact.nonfinite_place
        rounded = place is not None and (self.bad_layer is None or place.layer <= self.bad_layer)
        return None if rounded and OVERFLOWS in fault else fault

    def _traces(self, form: Callable[[LaunchTrace], T]) -> dict[str, T]:
        return {one.name: form(one.launched) for one in self._runners if one.arm.kernel is not None}


def _token_table(
    windows: Windows, chosen: range, arms: Sequence[str], scores: Mapping[str, TokenScores]
) -> pa.Table:
    """Rows by window, then arm, then position: the order of a run's file does not depend on its groups."""
    live = [name for name in arms if name in scores]
    if not live:
        return TOKEN_SCHEMA.empty_table()
    scored = np.arange(windows.scored_positions.start, windows.scored_positions.stop)
    shape = len(chosen), len(live), len(scored)
    # An arm runs whole windows, not always all of them.
    ran = np.stack([scores[name].ran.reshape(len(chosen), -1) for name in live], 1).ravel()

    def of_position(values: np.ndarray) -> np.ndarray:
        """[windows, scored] to all rows."""
        return np.broadcast_to(values[:, None], shape).ravel()[ran]

    tokens, targets = (x[chosen.start : chosen.stop] for x in (windows.tokens, windows.targets))
    by_arm = [
        np.stack([column.reshape(len(chosen), -1) for column in columns], 1).ravel()[ran]
        for columns in zip(*(scores[name][1:] for name in live), strict=True)
    ]
    number = np.broadcast_to(np.arange(len(live), dtype=np.int32)[None, :, None], shape).ravel()[ran]
    columns = [
        np.broadcast_to(np.asarray(chosen)[:, None, None], shape).ravel()[ran],
        of_position(np.broadcast_to(scored, (len(chosen), len(scored)))),
        of_position(np.broadcast_to(scored + 1, (len(chosen), len(scored)))),
        of_position(tokens[:, scored]),
        of_position(targets),
        pa.DictionaryArray.from_arrays(number, live),
        *by_arm,
    ]
    arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, TOKEN_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=TOKEN_SCHEMA)


# Order of top1.parquet, whatever the groups were.
_IN_TEXT = [("window", "ascending"), ("position", "ascending"), ("candidate", "ascending")]


def join_groups(groups: Sequence[GroupResult]) -> GroupResult:
    """All groups of a run as one."""
    first = groups[0]
    joined = GroupResult(
        tokens=pa.concat_tables([g.tokens for g in groups]).combine_chunks(),
        layers=pa.concat_tables([g.layers for g in groups]).combine_chunks(),
        top1=pa.concat_tables([g.top1 for g in groups]).combine_chunks().sort_by(_IN_TEXT),
        alone=pa.concat_tables([g.alone for g in groups]).combine_chunks(),
        findings={name: Findings() for name in first.findings},
        traces={name: LaunchTrace() for name in first.traces},
        drift=join_drift([g.drift for g in groups]),
        windows=range(first.windows.start, groups[-1].windows.stop),
        groups=len(groups),
    )
    for group in groups:
        for name, findings in group.findings.items():
            joined.findings[name] = joined.findings[name].joined(findings)
        for name, trace in group.traces.items():
            joined.traces[name].add(trace)
        for kind, seconds in group.seconds.items():
            joined.seconds[kind] = joined.seconds.get(kind, 0.0) + seconds
        joined.product_flop += group.product_flop
        joined.read_bytes.update(group.read_bytes)
        joined.left_out += group.left_out
        joined.anonymous_bytes = max(joined.anonymous_bytes, group.anonymous_bytes)
    return joined
