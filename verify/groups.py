"""Running one group of windows: what the arms computed, what was seen, and what was launched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
import torch

from data import Windows
from kernels.trace import LaunchTrace
from model.runner import LayerCall, Progress, Runner
from verify.arms import Arm, ArmRunner, Findings
from verify.environment import anonymous_memory
from verify.inplace import HeadErrors, InPlace
from verify.referee import LogitsFiles
from verify.scoring import Scorer, TokenScores

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
_ARROW_TYPES = {int: pa.int32(), float: pa.float64(), str: pa.string()}
LAYER_SCHEMA = pa.schema([(name, _ARROW_TYPES[kind]) for name, kind in get_type_hints(HeadErrors).items()])


@dataclass
class GroupResult:
    """What one group left: everything that a verdict needs, and nothing of the model.

    windows: those that it ran; seconds: by kind of work; product_flop: operations of the weight products of
    all arms; anonymous_bytes: the most anonymous memory seen; groups: how many this is, joined ones included;
    read_bytes: of the model's file, by tensor.
    """

    tokens: pa.Table
    layers: pa.Table
    findings: dict[str, Findings]
    traces: dict[str, LaunchTrace]
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
            "seconds": self.seconds,
            "product_flop": self.product_flop,
            "anonymous_bytes": self.anonymous_bytes,
            "windows": [self.windows.start, self.windows.stop],
            "read_bytes": self.read_bytes,
        }

    @classmethod
    def from_state(cls, tokens: pa.Table, layers: pa.Table, state: dict[str, Any]) -> GroupResult:
        return cls(
            tokens,
            layers,
            {name: Findings.from_json(found) for name, found in state["findings"].items()},
            {name: LaunchTrace.from_json(lines) for name, lines in state["traces"].items()},
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
    progress: Progress | None = None,
    logits_files: LogitsFiles | None = None,
) -> GroupResult:
    """Run the windows `chosen` through every arm.

    capture: called with every layer's inputs of the exact arm; logits_files: where logits are saved, and
    engines' come from. Findings and traces of the arms start anew; an arm that failed in an earlier group
    does not run again.
    """
    for arm in arms:
        arm.findings = Findings(failure=arm.findings.failure, failure_place=arm.findings.failure_place)
        if arm.kernel is not None:
            arm.kernel.trace = LaunchTrace()
    runner.stopwatch.reset()
    runner.stream.read_bytes.clear()
    in_place = InPlace(
        arms,
        seed=seed,
        windows_at_once=runner.tiling(windows.n_ctx).windows,
        windows=windows.n_windows,
    )

    def watch(call: LayerCall) -> None:
        with runner.stopwatch.time("in place"):
            in_place(call)
        if capture is not None:
            capture(call)

    board: dict[str, torch.Tensor] = {}
    watched = [
        ArmRunner(arm, board, seed=seed, watch=watch if arm.role == "exact" else None)
        for arm in arms
        if arm.role != "engine"
    ]
    most = anonymous_memory()

    def step(done: int, total: int) -> None:
        nonlocal most
        most = max(most, anonymous_memory())
        if progress:
            progress(done, total)

    tokens = torch.from_numpy(windows.tokens[chosen.start : chosen.stop])
    exact = next((arm.name for arm in arms if arm.role == "exact"), None)
    by_name = {arm.name: arm for arm in arms}
    baseline_of = {arm.name: arm.reference for arm in arms if arm.reference is not None}
    targets = windows.targets[chosen.start : chosen.stop].astype(np.int64)
    scorer = Scorer(
        exact=exact, baseline_of=baseline_of, targets=torch.from_numpy(targets.ravel()).to(runner.device)
    )
    slices = runner.run_group(
        tokens,
        watched,
        scored=windows.scored_positions,
        first_window=chosen.start,
        progress=step,
        whole_vocabulary=logits_files is not None,
    )
    for piece in slices:
        if logits_files is not None:
            piece = logits_files.pass_through(piece, chosen.start)
        with runner.stopwatch.time("scoring"):
            scorer.add(piece)
        most = max(most, anonymous_memory())
    for name, same in scorer.logits_equal.items():
        by_name[name].findings.logits_equal &= same
    layers = [pa.array(c).cast(f.type) for c, f in zip(_columns(in_place.rows), LAYER_SCHEMA, strict=True)]
    return GroupResult(
        _token_table(windows, chosen, [arm.name for arm in arms], scorer.scores()),
        pa.Table.from_arrays(layers, schema=LAYER_SCHEMA),
        {arm.name: arm.findings for arm in arms},
        {arm.name: arm.kernel.trace for arm in arms if arm.kernel is not None},
        runner.stopwatch.seconds,
        runner.stopwatch.flop,
        most,
        chosen,
        read_bytes=Counter(runner.stream.read_bytes),
    )


def _token_table(
    windows: Windows, chosen: range, arms: Sequence[str], scores: Mapping[str, TokenScores]
) -> pa.Table:
    """Rows by window, then arm, then position: the order of a run's file does not depend on its groups."""
    live = [name for name in arms if name in scores]
    if not live:
        return TOKEN_SCHEMA.empty_table()
    scored = np.arange(windows.scored_positions.start, windows.scored_positions.stop)
    shape = len(chosen), len(live), len(scored)

    def of_position(values: np.ndarray) -> np.ndarray:
        """[windows, scored] to all rows."""
        return np.broadcast_to(values[:, None], shape).ravel()

    tokens, targets = (x[chosen.start : chosen.stop] for x in (windows.tokens, windows.targets))
    by_arm = [
        np.stack([column.reshape(len(chosen), -1) for column in columns], 1).ravel()
        for columns in zip(*(scores[name] for name in live), strict=True)
    ]
    number = np.broadcast_to(np.arange(len(live), dtype=np.int32)[None, :, None], shape).ravel()
    columns = [
        np.broadcast_to(np.asarray(chosen)[:, None, None], shape).ravel(),
        of_position(np.broadcast_to(scored, (len(chosen), len(scored)))),
        of_position(np.broadcast_to(scored + 1, (len(chosen), len(scored)))),
        of_position(tokens[:, scored]),
        of_position(targets),
        pa.DictionaryArray.from_arrays(number, live),
        *by_arm,
    ]
    arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, TOKEN_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=TOKEN_SCHEMA)


def _columns(rows: Sequence[HeadErrors]) -> list[list[Any]]:
    if not rows:
        return [[] for _ in LAYER_SCHEMA]
    return [list(column) for column in zip(*rows, strict=True)]


def join_groups(groups: Sequence[GroupResult]) -> GroupResult:
    """All groups of a run as one."""
    first = groups[0]
    joined = GroupResult(
        pa.concat_tables([g.tokens for g in groups]).combine_chunks(),
        pa.concat_tables([g.layers for g in groups]).combine_chunks(),
        {name: Findings() for name in first.findings},
        {name: LaunchTrace() for name in first.traces},
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
