"""Running one group of windows: what the arms computed, what was seen, and what was launched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from verify.arms.arm import Arm, ArmRunner, Findings
from verify.arms.model_health import OVERFLOWS, model_fault
from verify.arms.own_error import InPlace
from verify.data import Windows
from verify.kernels.trace import LaunchTrace
from verify.machine.environment import anonymous_memory
from verify.model.logits import State
from verify.model.runner import LayerCall, Progress, Runner
from verify.ppl.checkpoint import Checkpoint, Checkpoints
from verify.ppl.drift import DriftSums, join_drift, position_edges
from verify.ppl.engine_logits import LogitsFiles
from verify.ppl.frozen import Fault, FrozenRunner, Teacher, frozen_name
from verify.ppl.sample import Sample
from verify.ppl.scoring import Scorer, TokenScores
from verify.ppl.top1 import changed_tokens

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


@dataclass
class GroupResult:
    """What one group left: everything that a verdict needs, and nothing of the model.

    top1: tokens whose most likely token changed; drift: sums of squares, see `join_drift`; windows: those
    that it ran; seconds: by kind of work; product_flop: operations of the weight products of all passes;
    anonymous_bytes: the most anonymous memory seen; groups: how many this is, joined ones included;
    read_bytes: of the model's file, by tensor.
    """

    tokens: pa.Table
    layers: pa.Table
    top1: pa.Table
    findings: dict[str, Findings]
    traces: dict[str, LaunchTrace]
    drift: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    product_flop: float = 0.0
    anonymous_bytes: int = 0
    windows: range = range(0)
    groups: int = 1
    read_bytes: Counter[str] = field(default_factory=Counter)

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
        }

    @classmethod
    def from_state(
        cls, tokens: pa.Table, layers: pa.Table, top1: pa.Table, state: dict[str, Any]
    ) -> GroupResult:
        return cls(
            tokens,
            layers,
            top1,
            {name: Findings.from_json(found) for name, found in state["findings"].items()},
            {name: LaunchTrace.from_json(lines) for name, lines in state["traces"].items()},
            state["drift"],
            state["seconds"],
            state["product_flop"],
            state["anonymous_bytes"],
            range(*state["windows"]),
            read_bytes=Counter(state["read_bytes"]),
        )


def run_group(
    runner: Runner,
    windows: Windows,
    chosen: range,
    arms: Sequence[Arm],
    *,
    seed: int,
    capture: Callable[[LayerCall], None] | None = None,
    faults: Mapping[str, Fault] | None = None,
    prompt: Arm | None = None,
    progress: Progress | None = None,
    logits_files: LogitsFiles | None = None,
    measured: int = 0,
    checkpoints: Checkpoints | None = None,
    begin: Checkpoint | None = None,
) -> GroupResult:
    """Run the windows `chosen` through every arm, freely and with frozen casts.

    capture: called with every layer's inputs of the exact arm; faults: planted in the first baseline's
    result, a frozen pass each; prompt: runs what comes before the scored positions; logits_files: where
    logits are saved, and engines' come from; measured: windows of the text, 0 for all, on which kernels are
    measured and the floor arm runs (`Sample`); checkpoints: where the group is kept between layers, begin:
    one of these windows to go on from. Findings of the arms start anew; an arm that failed in an earlier
    group does not run again.
    """
    launching = [*arms, prompt] if prompt is not None else list(arms)
    for arm in launching:
        arm.findings = Findings(failure=arm.findings.failure, failure_place=arm.findings.failure_place)
    runner.stopwatch.reset()
    runner.stream.read_bytes.clear()
    tokens = torch.from_numpy(windows.tokens[chosen.start : chosen.stop])
    first, rest = 0, None
    if prompt is not None:
        # The last token of a window is a target only: nothing needs its keys.
        tokens = tokens[:, : windows.scored_positions.stop]
        first, rest = windows.first_scored, windows.scored_per_window
    at_once = runner.tiling(tokens.shape[1], rest).windows
    sample = Sample(windows.n_windows, measured=measured, at_once=at_once)
    in_place = InPlace(sample, seed=seed, at_once=at_once)
    victim = next((arm for arm in arms if arm.role == "baseline"), None)
    teacher = Teacher(arms, in_place, seed=seed, faults=faults, victim=victim.name if victim else "")
    drift = DriftSums(position_edges(tokens.shape[1], first), runner.device)

    def watch(call: LayerCall, oracle: torch.Tensor) -> None:
        if call.window in sample:
            with runner.stopwatch.time("in place"):
                teacher(call, oracle)
        if capture is not None:
            capture(call)

    board: dict[str, torch.Tensor] = {}
    passes: list[ArmRunner | FrozenRunner] = []
    for arm in arms:
        if arm.role == "engine":
            continue
        is_exact = arm.role == "exact"
        # The control has its baseline's bits, or the run is void.
        seen = None if arm.role == "control" else partial(drift, exact=is_exact)
        passes.append(
            ArmRunner(
                arm,
                board,
                seed=seed,
                watch=watch if is_exact else None,
                seen=seen,
                wait=False,
                again=teacher.first,
            )
        )
    passes += [FrozenRunner(frozen_name(arm.name), arm, teacher, drift) for arm in teacher.arms]
    if victim is not None:
        passes += [FrozenRunner(name, victim, teacher, drift) for name in teacher.faults]
    before_scored = ArmRunner(prompt, board) if prompt is not None else None
    runners = [one for one in (*passes, before_scored) if isinstance(one, ArmRunner)]
    launched = {one.name: one for one in runners if one.arm.kernel is not None}
    on_sample = {one.name for one in passes if isinstance(one, FrozenRunner) or one.arm.role == "floor"}
    most = anonymous_memory()

    def step(done: int, total: int) -> None:
        nonlocal most
        most = max(most, anonymous_memory())
        if progress:
            progress(done, total)

    exact, floor = (next((a.name for a in arms if a.role == role), None) for role in ("exact", "floor"))
    by_name = {arm.name: arm for arm in arms}
    baseline_of = {arm.name: arm.reference for arm in arms if arm.reference is not None}
    baseline_of |= {
        frozen_name(arm.name): frozen_name(arm.reference) for arm in teacher.arms if arm.reference is not None
    }
    if victim is not None:
        baseline_of |= dict.fromkeys(teacher.faults, frozen_name(victim.name))
    targets = windows.targets[chosen.start : chosen.stop].astype(np.int64)
    scorer = Scorer(
        exact=exact, baseline_of=baseline_of, targets=torch.from_numpy(targets.ravel()).to(runner.device)
    )

    def settle() -> None:
        for one in passes:
            if isinstance(one, ArmRunner):
                one.settle()

    # The first layer after which the exact arm's state is not finite.
    bad_layer: int | None = None

    def layer_done(layers: int, hidden: dict[State, torch.Tensor]) -> None:
        nonlocal bad_layer
        states = [x for (_, name), x in hidden.items() if name == exact] if bad_layer is None else []
        if not all(bool(torch.isfinite(x).all()) for x in states):
            bad_layer = layers - 1
        if checkpoints is not None and checkpoints.due:
            settle()
            evidence = {
                "findings": {arm.name: arm.findings.to_json() for arm in launching},
                "traces": {name: one.launched.to_json() for name, one in launched.items()},
                "in_place": in_place.state(),
                "drift": drift.sums,
                "seconds": runner.stopwatch.seconds,
                "flop": runner.stopwatch.flop,
                "read_bytes": dict(runner.stream.read_bytes),
            }
            checkpoints.keep(Checkpoint(chosen, layers, hidden, evidence))

    if begin is not None:
        evidence = begin.evidence
        for arm in launching:
            arm.findings = Findings.from_json(evidence["findings"][arm.name])
        for name, one in launched.items():
            one.launched = LaunchTrace.from_json(evidence["traces"][name])
        in_place.restore(evidence["in_place"])
        drift.sums = dict(evidence["drift"])
        runner.stopwatch.restore(evidence["seconds"], evidence["flop"])
        runner.stream.read_bytes.update(evidence["read_bytes"])
    slices = runner.run_group(
        tokens,
        passes,
        scored=windows.scored_positions,
        first_window=chosen.start,
        progress=step,
        whole_vocabulary=logits_files is not None,
        prompt=before_scored,
        takes=lambda name, window: name not in on_sample or window in sample,
        layer_done=layer_done,
        begin=(begin.layers, begin.hidden) if begin is not None else None,
    )
    for piece in slices:
        if logits_files is not None:
            piece = logits_files.pass_through(piece, chosen.start)
        with runner.stopwatch.time("scoring"):
            scorer.add(piece)
        most = max(most, anonymous_memory())
    settle()
    for name, same in scorer.logits_equal.items():
        if name in by_name:
            by_name[name].findings.logits_equal &= same
    scores = scorer.scores()
    if exact in scores and not np.isfinite(scores[exact].nll).all():
        by_name[exact].findings.model_fault = _model_fault(runner, by_name[exact], bad_layer)
    names = [*by_name, *(one.name for one in passes if one.name not in by_name)]
    top1 = changed_tokens(
        scorer.best_two(),
        scores[floor].kld_to_exact if floor is not None and floor in scores else None,
        [arm for arm in arms if arm.role == "candidate"],
        exact,
        chosen,
        windows.scored_positions,
    )
    return GroupResult(
        _token_table(windows, chosen, names, scores),
        in_place.table(),
        top1,
        {arm.name: arm.findings for arm in arms},
        {name: one.launched for name, one in launched.items()},
        drift.to_json(),
        runner.stopwatch.seconds,
        runner.stopwatch.flop,
        most,
        chosen,
        read_bytes=Counter(runner.stream.read_bytes),
    )


def _model_fault(runner: Runner, exact: Arm, layer: int | None) -> str | None:
    """What is wrong with the model; None where its q, k or v alone overflow what they are rounded to."""
    fault = model_fault(runner.architecture, layer)
    place = exact.findings.nonfinite_place
    rounded = place is not None and (layer is None or place.layer <= layer)
    return None if rounded and OVERFLOWS in fault else fault


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
        pa.concat_tables([g.tokens for g in groups]).combine_chunks(),
        pa.concat_tables([g.layers for g in groups]).combine_chunks(),
        pa.concat_tables([g.top1 for g in groups]).combine_chunks().sort_by(_IN_TEXT),
        {name: Findings() for name in first.findings},
        {name: LaunchTrace() for name in first.traces},
        join_drift([g.drift for g in groups]),
        windows=range(first.windows.start, groups[-1].windows.stop),
        groups=len(groups),
    )
    for group in groups:
        for name, found in group.findings.items():
            joined.findings[name].merge(found)
        for name, trace in group.traces.items():
            joined.traces[name].add(trace)
        for kind, seconds in group.seconds.items():
            joined.seconds[kind] = joined.seconds.get(kind, 0.0) + seconds
        joined.product_flop += group.product_flop
        joined.read_bytes.update(group.read_bytes)
        joined.anonymous_bytes = max(joined.anonymous_bytes, group.anonymous_bytes)
    return joined
