"""The kernel diff: every candidate against the baseline, over shapes, lengths and families of inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from verify.arms.model_facts import check_lengths, check_shapes
from verify.diff.captured import captured_inputs
from verify.diff.cells import Cell, Inputs, compare, examine, judge, suspicions
from verify.diff.probing import PROBES, Probing, probe_kernels
from verify.judge.statistics import DistanceRatio
from verify.judge.verdict import DEFAULT_MARGIN, EXIT_CODES, Decision, Verdict, overall
from verify.kernels.call import AttentionPath, Shape
from verify.kernels.judging.families import FAMILIES, Sizes, draw
from verify.kernels.judging.probes import why_not_one_hot
from verify.kernels.plans.shapes import ModelShape, shape_named
from verify.kernels.plans.spec import parse_spec
from verify.kernels.registry import IN_OWN_PROCESS, build_kernel
from verify.kernels.trace import LaunchTrace
from verify.machine import environment
from verify.machine.command_line import command_line
from verify.machine.devices import is_out_of_memory
from verify.machine.errors import UsageError
from verify.machine.stages import StageClock
from verify.ppl.settings import check_margin

# 2: `gain` is that of `verify ppl` and `gen`, over all rows, unweighted.
SCHEMA = 2
# Cut edges that inputs are made for: the first and the last few of a plan.
MOST_EDGES = 6


@dataclass(frozen=True)
class DiffSettings:
    """What a kernel diff runs over, each shape, length and family once.

    captured_from: folder of a `verify ppl --capture` run, whose inputs stand in the place of all these.
    """

    shapes: tuple[str, ...]
    n_kvs: tuple[int, ...]
    families: tuple[str, ...]
    baseline: str
    candidates: tuple[str, ...]
    device: str
    path: AttentionPath = "decode"
    seeds: int = 1
    first_seed: int = 0
    margin: float = DEFAULT_MARGIN
    captured_from: str | None = None

    def __post_init__(self) -> None:
        known = (PROBES, *FAMILIES)
        unknown = [f for f in self.families if f not in known]
        if unknown:
            raise UsageError(f"--inputs {unknown[0]}: expected all or any of {', '.join(known)}")
        check_margin(self.margin)
        if self.seeds < 1:
            raise UsageError(f"--seeds {self.seeds}: expected at least 1")
        # The same inputs twice are no more evidence than once, under whatever name.
        shapes = {shape_named(name)._replace(name=""): name for name in reversed(self.shapes)}
        object.__setattr__(self, "shapes", tuple(reversed(shapes.values())))
        object.__setattr__(self, "n_kvs", tuple(dict.fromkeys(self.n_kvs)))
        object.__setattr__(self, "families", tuple(dict.fromkeys(self.families)))


class Line(NamedTuple):
    """The cells of one shape and length, judged together: a line of the report."""

    cells: list[Cell]
    decision: Decision
    ratio: DistanceRatio | None


@dataclass
class CandidateResult:
    """One candidate over all cells."""

    spec: str
    verdict: Verdict
    reasons: list[str]
    cells: list[Cell]
    lines: list[Line]
    ratio: DistanceRatio | None
    trace: LaunchTrace


@dataclass
class DiffOutcome:
    """The results, `run.json`, and one line that says where the time went.

    stopped: why the cells end before their time, or nothing; interrupted: by the user.
    """

    settings: DiffSettings
    candidates: list[CandidateResult]
    verdict: Verdict
    exit_code: int
    notes: list[str]
    run: dict[str, Any]
    seconds: str
    stopped: str = ""
    interrupted: bool = False


def all_inputs(settings: DiffSettings, device: torch.device, clock: StageClock) -> Iterator[Inputs | Probing]:
    """The inputs of every cell, one at a time. Raises SpecError, UsageError."""
    if settings.captured_from is not None:
        yield from captured_inputs(settings.captured_from, settings.path, device)
        return
    for name in settings.shapes:
        shape = shape_named(name)
        for n_kv in settings.n_kvs:
            sizes = _sizes(settings, shape, n_kv)
            for family in settings.families:
                if family == PROBES:
                    yield Probing(shape.name, n_kv, sizes)
                    continue
                for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
                    with clock.stage("inputs drawn", n_kv):
                        call = draw(family, sizes, seed, device=device)
                    yield Inputs(shape.name, n_kv, family, seed, call)


def count_inputs(settings: DiffSettings) -> int | None:
    """How many cells there will be, None where a folder decides."""
    if settings.captured_from is not None:
        return None
    drawn = sum(settings.seeds if family != PROBES else 1 for family in settings.families)
    return len(settings.shapes) * len(settings.n_kvs) * drawn


def check_settings(settings: DiffSettings) -> None:
    """Refuse now what would be refused later: shapes, specifications, plans that do not fit a shape.

    Raises SpecError, UsageError.
    """
    shapes = [shape_named(name) for name in settings.shapes]
    check_shapes((settings.baseline, *settings.candidates), shapes, settings.path)
    check_lengths(settings.n_kvs, shapes, torch.device(settings.device))


def run_diff(
    settings: DiffSettings, device: torch.device, inputs: Iterator[Inputs | Probing], clock: StageClock
) -> DiffOutcome:
    """Examine every kernel on every input, and judge every candidate.

    An interruption, or too little memory, ends it: what was examined by then is judged, and the outcome says
    what stopped it. Raises UsageError for too little memory where nothing was.
    """
    baseline = build_kernel(settings.baseline)
    candidates = [build_kernel(spec) for spec in settings.candidates]
    cells: list[list[Cell]] = [[] for _ in candidates]
    traces = [LaunchTrace() for _ in candidates]
    base_trace = LaunchTrace()
    left_out: dict[str, set[str]] = {}
    few_words: list[str] = []
    stopped, interrupted, examined = "", False, 0
    each: Inputs | Probing | None = None
    try:
        for each in inputs:
            if isinstance(each, Probing):
                if (why := why_not_one_hot(each.sizes)) is not None:
                    few_words.append(f"one-hot probes of {each.shape} at {each.n_kv} keys left out: {why}")
                probed = probe_kernels([baseline, *candidates], each, device, clock)
                for i, evidence in enumerate(probed[1:]):
                    if evidence.refused:
                        left_out.setdefault(evidence.spec, set()).add(PROBES)
                    else:
                        cells[i].append(compare(each.inputs, probed[0], evidence))
                examined += 1
                continue
            reference, *others = examine([baseline, *candidates], each, clock)
            if reference is None:
                left_out.setdefault(baseline.spec, set()).add(each.family)
                continue
            base_trace.add(reference.trace)
            for i, (kernel, found) in enumerate(zip(candidates, others, strict=True)):
                if found is None:
                    left_out.setdefault(kernel.spec, set()).add(each.family)
                    continue
                traces[i].add(found.trace)
                cell = compare(each, reference, found)
                # Outputs are compared above; only their errors are kept.
                found.output = None
                cells[i].append(cell)
            reference.output = None
            examined += 1
    except KeyboardInterrupt:
        stopped, interrupted = f"interrupted after {examined} inputs", True
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        after = f"after {each.shape} at {each.n_kv} keys" if each else "at the first inputs"
        stopped = f"--shape, --n-kv: {settings.device} has too little memory, {after}"
        if not any(cells):
            raise UsageError(stopped) from None
    finally:
        for kernel in (baseline, *candidates):
            kernel.close()
    results = [
        _judge(kernel.spec, of_kernel, trace, settings.margin)
        for kernel, of_kernel, trace in zip(candidates, cells, traces, strict=True)
    ]
    verdict = overall([Decision(r.verdict, r.reasons) for r in results])
    notes = sorted({note for kernel in (baseline, *candidates) for note in kernel.notes})
    notes += [*few_words, *([stopped] if stopped else [])]
    notes += [
        f"{spec} does not take what inputs {', '.join(sorted(families))} need: left out"
        for spec, families in left_out.items()
    ]
    run = _run_json(settings, results, base_trace, verdict, notes, str(device))
    run["seconds"] = clock.to_json()
    return DiffOutcome(
        settings, results, verdict, EXIT_CODES[verdict], notes, run, str(clock), stopped, interrupted
    )


def command_of(settings: DiffSettings, cell: Cell) -> str:
    """The command that makes this cell again, alone."""
    inputs: dict[str, Any] = {"captured_from": settings.captured_from}
    if settings.captured_from is None:
        i = cell.inputs
        inputs = {"shape": i.shape, "n_kv": i.n_kv, "inputs": i.family, "first_seed": i.seed}
    asked = {"device": settings.device, "path": settings.path, "baseline": settings.baseline}
    return command_line(["diff"], {**inputs, **asked, "candidates": [cell.candidate.spec]})


def _judge(spec: str, cells: list[Cell], trace: LaunchTrace, margin: float) -> CandidateResult:
    """The verdict over all cells, and where it is broken or degraded: at which shapes, lengths and inputs."""
    if not cells:
        return CandidateResult(spec, "inconclusive", ["it takes none of the inputs"], [], [], None, trace)
    decision, ratio = judge(cells, margin)
    lines = [Line(of_line, *judge(of_line, margin)) for of_line in _by_line(cells)]
    reasons = list(decision.reasons)
    verdict = decision.verdict
    if verdict == "broken":
        reasons.append(_where([c for c in cells if c.faults], cells))
    elif worse := [line for line in lines if line.decision.verdict == "degraded"]:
        # Pooled over all lengths a loss at one of them may vanish: a single line is enough.
        verdict = "degraded"
        reasons.append(_where([c for line in worse for c in line.cells], cells))
    return CandidateResult(spec, verdict, reasons, cells, lines, ratio, trace)


def _by_line(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each shape and length."""
    lines: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        lines.setdefault((cell.inputs.shape, cell.inputs.n_kv), []).append(cell)
    return list(lines.values())


def _where(chosen: Sequence[Cell], of: Sequence[Cell]) -> str:
    """In which cells something is so, and in which it is not: by shape, length and family."""

    def values(cells: Sequence[Cell], name: str) -> list[Any]:
        return sorted({getattr(c.inputs, name) for c in cells})

    words = [f"{len(chosen)} of {len(of)} cells"]
    for name, called in (("shape", "shape"), ("n_kv", "n_kv"), ("family", "inputs")):
        here, everywhere = values(chosen, name), values(of, name)
        if len(here) < len(everywhere):
            words.append(f"only at {called} {', '.join(map(str, here))}")
    return "; ".join(words)


def _sizes(settings: DiffSettings, shape: ModelShape, n_kv: int) -> Sizes:
    """Two rows of about n_kv keys; edges where the plans of the kernels cut, and tiles end."""
    return Sizes(
        n_kv=(n_kv, max(n_kv - 37, 1)),
        kv_heads=shape.kv_heads,
        ratio=shape.ratio,
        k_size=shape.k_size,
        v_size=shape.v_size,
        edges=_edges(settings, shape, n_kv),
        path=settings.path,
    )


def _edges(settings: DiffSettings, shape: ModelShape, n_kv: int) -> tuple[int, ...]:
    found: set[int] = set()
    for spec in (settings.baseline, *settings.candidates):
        if parse_spec(spec).name in IN_OWN_PROCESS:
            continue
        kernel = build_kernel(spec)
        cuts_at = kernel.arithmetic(_shape_of(shape, n_kv), settings.path).cuts_at
        found |= set(cuts_at(n_kv)[1:-1]) if cuts_at is not None else set()
    found |= {64 * (n_kv // 128), 64} if n_kv > 64 else set()
    inside = sorted(edge for edge in found if 0 < edge < n_kv)
    half = MOST_EDGES // 2
    return tuple(inside if len(inside) <= MOST_EDGES else inside[:half] + inside[-half:])


def _shape_of(shape: ModelShape, n_kv: int) -> Shape:
    return Shape(1, 2, n_kv, shape.q_heads, shape.kv_heads, shape.k_size, shape.v_size)


def _run_json(
    settings: DiffSettings,
    results: Sequence[CandidateResult],
    base_trace: LaunchTrace,
    verdict: Verdict,
    notes: list[str],
    device: str,
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "command": "diff",
        "verdict": verdict,
        "exit_code": EXIT_CODES[verdict],
        "reasons": [f"{r.spec}: {reason}" for r in results for reason in r.reasons],
        "notes": notes,
        "settings": {
            "shapes": list(settings.shapes),
            "n_kv": list(settings.n_kvs),
            "families": list(settings.families),
            "baseline": settings.baseline,
            "candidates": list(settings.candidates),
            "path": settings.path,
            "seeds": settings.seeds,
            "first_seed": settings.first_seed,
            "margin": settings.margin,
            "captured_from": settings.captured_from,
        },
        "environment": environment.describe(device),
        "pairs": [
            {
                "reference": settings.baseline,
                "candidate": r.spec,
                "path": settings.path,
                "verdict": r.verdict,
                "reasons": r.reasons,
                "distance_ratio": r.ratio.ratio if r.ratio else None,
                "distance_ratio_ci": [r.ratio.low, r.ratio.high] if r.ratio else None,
                "bitwise_equal": all(c.bitwise_equal for c in r.cells if c.compared)
                and any(c.compared for c in r.cells),
            }
            for r in results
        ],
        "coverage": [
            {"spec": spec, **line.to_json()}
            for spec, trace in [(settings.baseline, base_trace), *((r.spec, r.trace) for r in results)]
            for line in trace.coverage()
        ],
        "cells": [_cell_json(settings, c) for r in results for c in r.cells],
        "detectable": {r.spec: r.ratio.detectable if r.ratio else None for r in results},
    }


def _cell_json(settings: DiffSettings, cell: Cell) -> dict[str, Any]:
    i = cell.inputs
    decision, ratio = judge([cell], settings.margin)
    return {
        "spec": cell.candidate.spec,
        "shape": i.shape,
        "n_kv": i.n_kv,
        "family": i.family,
        "seed": i.seed,
        "verdict": decision.verdict,
        "distance_ratio": ratio.ratio if ratio else None,
        "faults": cell.faults,
        "suspicions": suspicions(cell.candidate),
        "covered": cell.covered,
        "bitwise_equal": cell.bitwise_equal,
        "again": command_of(settings, cell),
        **cell.candidate.to_json(),
        "baseline": cell.baseline.to_json(),
    }
