"""The kernel diff: every candidate against the baseline, over shapes, lengths and families of inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from verify.arms.alone import TimeShare
from verify.arms.result_type import matched, shows_its_type
from verify.diff.cells import (
    Cell,
    compare,
    evidence_of,
    faults_of,
    judge_alone,
    judge_cells,
    say_what_is_hidden,
)
from verify.diff.examining import CellInputs, KernelEvidence, examine
from verify.diff.inputs import DiffSettings, first_call, lengths_to_read
from verify.diff.probing import PROBES, Probing, probe_kernels
from verify.diff.results import CandidateResult, DiffOutcome, LengthLine, alone_sentence, run_json
from verify.identify.learning import learn
from verify.judge.strata import Judgement
from verify.judge.verdict import EXIT_CODES, Decision, PairEvidence, decide, overall
from verify.kernels.judging.families import FORMS
from verify.kernels.judging.probes import why_not_one_hot
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.plans.shapes import shape_named
from verify.kernels.registry import build_kernel
from verify.kernels.trace import LaunchTrace
from verify.machine.devices import is_out_of_memory
from verify.machine.errors import UsageError
from verify.machine.stages import StageClock

# More rows than this are no advice.
_MOST_ROWS = 1_000_000


def run_diff(
    settings: DiffSettings,
    device: torch.device,
    inputs: Iterator[CellInputs | Probing],
    clock: StageClock,
    *,
    build: Callable[[str], Kernel] = build_kernel,
) -> DiffOutcome:
    """Examine every kernel on every input, and judge every candidate.

    build: the kernel of a specification; the library's caller has functions that none can name, and closes
    what it built.

    An interruption, or too little memory, ends it: what was examined by then is judged, and the outcome says
    what stopped it. Raises UsageError for too little memory where nothing was.
    """
    candidates = [build(spec) for spec in settings.candidates]
    # Before anything else is asked of them: the first call of all is judged like any other.
    first, shown = _first_calls(settings, candidates, device, clock)
    learnt = [line for kernel in candidates for line in _learn(settings, kernel, device, clock)]
    matches = [
        matched(settings.baseline, kernel.spec, type_)
        for kernel, type_ in zip(candidates, shown, strict=True)
    ]
    baselines = {match.baseline: build(match.baseline) for match in matches}
    learnt += [line for kernel in baselines.values() for line in _learn(settings, kernel, device, clock)]
    cells: list[list[Cell]] = [[] for _ in candidates]
    traces = [LaunchTrace() for _ in candidates]
    base_traces = {spec: LaunchTrace() for spec in baselines}
    left_out: dict[str, set[str]] = {}
    share = TimeShare()
    few_words: list[str] = []
    # Findings that are no faults, in the order in which they came.
    said: dict[str, None] = {}
    stopped, interrupted, examined = "", False, 0
    each: CellInputs | Probing | None = None
    try:
        for each in inputs:
            asked = list(range(len(candidates)) if each.candidates is None else each.candidates)
            references = list(dict.fromkeys(matches[i].baseline for i in asked))
            kernels = [*(baselines[spec] for spec in references), *(candidates[i] for i in asked)]
            found: Sequence[KernelEvidence | None]
            if isinstance(each, Probing):
                if (why := why_not_one_hot(each.sizes)) is not None:
                    few_words.append(f"one-hot probes of {each.shape} at {each.n_kv} keys left out: {why}")
                probed = probe_kernels(kernels, each, device, clock, strict=settings.strict)
                found = [None if one.refused else one for one in probed]
            else:
                found = examine(kernels, each, clock, share)
                say_what_is_hidden(each, found)
            said |= dict.fromkeys(one.contract for one in found if one is not None and one.contract)
            family = PROBES if isinstance(each, Probing) else each.family
            for kernel, one in zip(kernels, found, strict=True):
                if one is None and not (family in FORMS and kernel.spec in baselines):
                    left_out.setdefault(kernel.spec, set()).add(family)
            of_baseline = dict(zip(references, found, strict=False))
            for spec, one in of_baseline.items():
                if one is not None:
                    base_traces[spec].add(one.trace)
            for i, one in zip(asked, found[len(references) :], strict=True):
                reference = of_baseline[matches[i].baseline]
                if one is None or (reference is None and family not in FORMS):
                    continue
                traces[i].add(one.trace)
                # A form is held against exact attention, whether or not the baseline has it.
                beside = reference or KernelEvidence(matches[i].baseline)
                cells[i].append(compare(each.inputs if isinstance(each, Probing) else each, beside, one))
            for one in found:
                if one is not None:
                    # Outputs are compared above; only their errors are kept.
                    one.output = one.exact = None
                    if one.alone is not None:
                        one.alone.out = None
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
        for kernel in (*baselines.values(), *candidates) if build is build_kernel else ():
            kernel.close()
    for i, (of_first, evidence) in first.items():
        if faults_of(evidence, "candidate") and not any(cell.faults for cell in cells[i]):
            cells[i].append(compare(of_first, KernelEvidence(matches[i].baseline), evidence))
    results = [
        _judge(settings, kernel.spec, match.baseline, of_kernel, trace)
        for kernel, match, of_kernel, trace in zip(candidates, matches, cells, traces, strict=True)
    ]
    verdict = overall([Decision(r.verdict, r.reasons) for r in results])
    notes = sorted({note for kernel in (*baselines.values(), *candidates) for note in kernel.notes})
    notes += learnt
    notes += [match.said for match in matches if match.said]
    said |= dict.fromkeys(f"{c.candidate.spec}: {c.shared}" for of in cells for c in of if c.shared)
    notes += [*said, *dict.fromkeys(few_words), *([stopped] if stopped else [])]
    notes += [
        f"{spec} does not take what inputs {', '.join(sorted(families))} need: left out"
        for spec, families in left_out.items()
    ]
    single = [alone_sentence(result.spec, result.cells, share) for result in results]
    notes += [sentence for sentence in single if sentence is not None]
    run = run_json(settings, results, base_traces, verdict, notes, str(device))
    run["seconds"] = clock.to_json()
    return DiffOutcome(
        settings=settings,
        candidates=results,
        verdict=verdict,
        exit_code=EXIT_CODES[verdict],
        notes=notes,
        run=run,
        seconds=str(clock),
        stopped=stopped,
        interrupted=interrupted,
    )


def _learn(settings: DiffSettings, kernel: Kernel, device: torch.device, clock: StageClock) -> list[str]:
    """What is read off a kernel that states nothing, in sentences."""
    shapes = [shape for shape in map(shape_named, settings.shapes) if not shape.v_in_k]
    if not shapes:
        return []
    with clock.stage("identify", max(settings.n_kvs)):
        return learn(
            kernel,
            list(dict.fromkeys(shape.heads for shape in shapes)),
            lengths_to_read(settings),
            path=settings.path,
            dtype=FLOAT_TYPES[settings.dtype].dtype,
            device=str(device),
        )


class _First(NamedTuple):
    """A kernel's first call, which shows the type that it returns, and is judged where it is wrong."""

    inputs: CellInputs
    evidence: KernelEvidence


def _first_calls(
    settings: DiffSettings, candidates: Sequence[Kernel], device: torch.device, clock: StageClock
) -> tuple[dict[int, _First], list[str]]:
    """First calls by number of candidate, of those that must be called to show their type; and all types."""
    inputs = first_call(settings, device)
    found: dict[int, _First] = {}
    types = []
    for i, kernel in enumerate(candidates):
        if shows_its_type(kernel.spec):
            (evidence,) = examine([kernel], inputs, clock)
            if evidence is not None:
                found[i] = _First(inputs, evidence)
            types.append(evidence.result_type if evidence is not None else "f32")
        else:
            types.append(kernel.result_type(inputs.call))
    return found, types


def _judge(
    settings: DiffSettings, spec: str, baseline: str, cells: list[Cell], trace: LaunchTrace
) -> CandidateResult:
    """The verdict over all cells, and where it is broken: at which shapes, lengths and inputs."""
    strata = judge_cells(cells, settings.margin)
    alone = judge_alone(cells, settings.margin)
    if not cells:
        reasons = ["it takes none of the inputs"]
        return CandidateResult(
            spec=spec,
            baseline=baseline,
            verdict="inconclusive",
            reasons=reasons,
            cells=[],
            lines=[],
            strata=strata,
            trace=trace,
        )

    def found(some: Sequence[Cell], of_these: Judgement, of_single: Judgement | None) -> PairEvidence:
        return evidence_of(
            some,
            of_these,
            margin=settings.margin,
            allow_same=settings.allow_same,
            narrowed_by=_advice(settings, of_these),
            alone=of_single,
        )

    lines = []
    for of_line in _by_line(cells):
        of = of_line[0].inputs.shape, of_line[0].inputs.n_kv
        own, single = strata.only(*of), alone.only(*of) if alone is not None else None
        lines.append(LengthLine(of_line, decide(found(of_line, own, single)), own))
    evidence = found(cells, strata, alone)
    decision = decide(evidence)
    reasons = list(decision.reasons)
    if decision.verdict == "broken":
        reasons.append(_where([c for c in cells if c.faults], cells))
    return CandidateResult(
        spec=spec,
        baseline=baseline,
        verdict=decision.verdict,
        reasons=reasons,
        cells=cells,
        lines=lines,
        strata=strata,
        alone=alone,
        trace=trace,
        evidence=evidence,
    )


def _advice(settings: DiffSettings, strata: Judgement) -> str:
    """How much more would decide what is inconclusive."""
    if settings.captured_from is not None:
        return "more captured layers do not narrow it: one layer's rows are one kind of input"
    rows = settings.rows * strata.times
    if rows > _MOST_ROWS:
        return f"no number of rows decides a ratio this near to the margin of {settings.margin:g}"
    return f"about --rows {math.ceil(rows)} would decide"


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
