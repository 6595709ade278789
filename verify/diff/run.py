"""The kernel diff: every candidate against the baseline, over shapes, lengths and families of inputs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from verify.arms.alone import TimeShare, is_asked_alone
from verify.arms.result_type import matched, shows_its_type
from verify.diff.cells import (
    Cell,
    compare,
    evidence_of,
    faults_of,
    judge_alone,
    judge_cells,
    limits_of,
    say_what_is_hidden,
)
from verify.diff.examining import CellInputs, KernelEvidence, examine, typical_error
from verify.diff.headroom import DiffHeadroom
from verify.diff.inputs import (
    FEW_ROWS,
    DiffSettings,
    brief_sentence,
    first_call,
    lengths_to_read,
    long_kinds,
    more_inputs,
    plain_call,
)
from verify.diff.looks import looks_sentence, undecided
from verify.diff.naming import looks_like
from verify.diff.probing import PROBES, Probing, probe_kernels
from verify.diff.results import CandidateResult, DiffOutcome, LengthLine, alone_sentence, run_json
from verify.diff.stored_baseline import BaselineStore, StoredBaseline
from verify.identify.learning import learn
from verify.judge.strata import Judgement
from verify.judge.verdict import EXIT_CODES, Decision, PairEvidence, decide, overall
from verify.kernels.eager import EagerKernel
from verify.kernels.flash.kernel import FlashKernel
from verify.kernels.judging.families import FORMS
from verify.kernels.judging.probes import why_not_one_hot
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.plans.shapes import shape_named
from verify.kernels.registry import build_kernel
from verify.kernels.trace import LaunchTrace
from verify.machine.devices import is_out_of_memory
from verify.machine.errors import UsageError
from verify.machine.processes import SharedWork, answered
from verify.machine.stages import StageClock

# More rows than this are no advice.
_MOST_ROWS = 1_000_000
# Processes that share the inputs: each holds a cell's tensors.
_MOST_PROCESSES = 8


Show = Callable[[Iterator[CellInputs], str], Iterator[CellInputs]]


def _unshown(inputs: Iterator[CellInputs], said: str) -> Iterator[CellInputs]:
    return inputs


def run_diff(
    settings: DiffSettings,
    device: torch.device,
    inputs: Iterator[CellInputs | Probing],
    clock: StageClock,
    *,
    build: Callable[[str], Kernel] = build_kernel,
    show: Show = _unshown,
    store: BaselineStore | None = None,
    stored: StoredBaseline | None = None,
    name_bugs: bool = True,
) -> DiffOutcome:
    """Examine every kernel on every input, and judge every candidate; kinds of input that cannot decide are
    drawn again until they do, or have had all their looks.

    build: the kernel of a specification; the library's caller has functions that none can name, and closes
    what it built. show: passes on the inputs of another look, and shows how far it is, with what it is.
    store: keeps what baselines do. stored: what they did, in the place of running them; there are no more
    looks than it has. name_bugs: broken candidates are asked a few small calls more, for what they look like.

    An interruption, or too little memory, ends it: what was examined by then is judged, and the outcome says
    what stopped it. Raises UsageError for too little memory where nothing was.
    """
    if stored is not None:
        stored.check(settings)
    if store is not None:
        store.begin(settings)
    candidates = [build(spec) for spec in settings.candidates]
    # Before anything else is asked of them: the first call of all is judged like any other.
    first, shown = _first_calls(settings, candidates, device, clock)
    learnt = [line for kernel in candidates for line in _learn(settings, kernel, device, clock)]
    matches = [
        matched(settings.baseline, kernel.spec, type_)
        for kernel, type_ in zip(candidates, shown, strict=True)
    ]
    baselines = {} if stored is not None else {match.baseline: build(match.baseline) for match in matches}
    learnt += [line for kernel in baselines.values() for line in _learn(settings, kernel, device, clock)]
    bench = _Bench(settings, device, clock, candidates, baselines, [match.baseline for match in matches])
    bench.store, bench.stored = store, stored
    stopped, interrupted = "", False
    try:
        bench.examine_all(inputs)
        for look in range(2, settings.looks + 1):
            wanted = undecided(settings, bench.judged())
            if not wanted:
                break
            kinds = f"look {look}: {len(wanted)} kinds of input cannot decide yet"
            before = bench.examined
            bench.examine_all(show(more_inputs(settings, wanted, device, clock), kinds))
            if bench.examined == before:
                break
    except KeyboardInterrupt:
        stopped, interrupted = f"interrupted after {bench.examined} inputs", True
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        last = bench.last
        after = f"after {last.shape} at {last.n_kv} keys" if last is not None else "at the first inputs"
        stopped = f"--shape, --n-kv: {settings.device} has too little memory, {after}"
        if not any(bench.cells):
            raise UsageError(stopped) from None
    finally:
        for kernel in (*baselines.values(), *candidates) if build is build_kernel else ():
            kernel.close()
    for i, (of_first, evidence) in first.items():
        if faults_of(evidence, "candidate") and not any(cell.faults for cell in bench.cells[i]):
            bench.cells[i].append(compare(of_first, KernelEvidence(matches[i].baseline), evidence))
    results = bench.judged()
    if name_bugs and not stopped:
        for result in results:
            if result.verdict == "broken":
                result.looks_like = _alike(result.spec, device, build)
    verdict = overall([Decision(r.verdict, r.reasons) for r in results])
    notes = sorted({note for kernel in (*baselines.values(), *candidates) for note in kernel.notes})
    notes += learnt
    notes += [match.said for match in matches if match.said]
    notes += [line for room in bench.rooms for line in room.sentences()]
    notes += [*bench.said(), *([stopped] if stopped else [])]
    for n_kv in settings.long_n_kvs:
        named = " and ".join(family for n, family in long_kinds(settings) if n == n_kv)
        notes += [f"{n_kv:,} keys: {FEW_ROWS} rows of {named}, for faults alone"] if named else []
    for n_kv in settings.brief_n_kvs:
        notes += [line] if (line := brief_sentence(settings, n_kv)) else []
    if stored is not None:
        notes.append(f"the baseline did not run: its figures are those of {stored.path} ({stored.device})")
    notes += [
        f"{spec} does not take what inputs {', '.join(sorted(families))} need: left out"
        for spec, families in bench.left_out.items()
    ]
    notes += [sentence for result in results if (sentence := looks_sentence(settings, result)) is not None]
    single = [alone_sentence(result.spec, result.cells, bench.share) for result in results]
    notes += [sentence for sentence in single if sentence is not None]
    run = run_json(settings, results, bench.base_traces, verdict, notes, settings.device)
    run["headroom"] = [room.to_json() for room in bench.rooms if room.cells]
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


def _alike(spec: str, device: torch.device, build: Callable[[str], Kernel]) -> list[str]:
    """Known bugs that a broken kernel looks like, sentences."""
    kernel = build(spec)
    try:
        return [str(each) for each in looks_like(kernel, device)]
    finally:
        if build is build_kernel:
            kernel.close()


@dataclass
class Examined:
    """What was found on one input."""

    # Number of the candidate, what it launched, and its cell.
    cells: list[tuple[int, LaunchTrace, Cell]] = field(default_factory=list)
    base_traces: dict[str, LaunchTrace] = field(default_factory=dict)  # of baselines, by specification
    left_out: list[tuple[str, str]] = field(default_factory=list)  # specifications, and the families
    contract: list[str] = field(default_factory=list)  # what is said of kernels, and no fault
    few_words: str = ""  # which probes were left out
    counts: int = 1  # inputs


class _Bench:
    """Kernels side by side, and what was found of them so far."""

    def __init__(
        self,
        settings: DiffSettings,
        device: torch.device,
        clock: StageClock,
        candidates: Sequence[Kernel],
        baselines: dict[str, Kernel],
        compared_with: Sequence[str],
    ) -> None:
        """compared_with: the baseline of each candidate."""
        self.settings, self.device, self.clock = settings, device, clock
        self.candidates, self.baselines, self.compared_with = candidates, baselines, compared_with
        self.cells: list[list[Cell]] = [[] for _ in candidates]
        self.traces = [LaunchTrace() for _ in candidates]
        self.base_traces = {spec: LaunchTrace() for spec in compared_with}
        # What baselines do is kept, or known already.
        self.store: BaselineStore | None = None
        self.stored: StoredBaseline | None = None
        # Families of inputs that a kernel does not take.
        self.left_out: dict[str, set[str]] = {}
        self.share = TimeShare()
        self.rooms = [DiffHeadroom(kernel) for kernel in candidates] if settings.headroom else []
        self._few_words: list[str] = []
        # Findings that are no faults, in the order in which they came.
        self._contract: dict[str, None] = {}
        self._typical: dict[tuple[str, str, int], float] = {}
        self.examined = 0
        self.last: CellInputs | Probing | None = None

    def enter(self, each: CellInputs | Probing, found: Examined) -> None:
        """Keep what was found on an input."""
        self.last = each
        inputs = each.inputs if isinstance(each, Probing) else each
        for i, trace, cell in found.cells:
            self.traces[i].add(trace)
            cell.inputs = inputs
            self.cells[i].append(cell)
        for spec, trace in found.base_traces.items():
            self.base_traces[spec].add(trace)
        for spec, family in found.left_out:
            self.left_out.setdefault(spec, set()).add(family)
        self._contract |= dict.fromkeys(found.contract)
        if found.few_words:
            self._few_words.append(found.few_words)
        self.examined += found.counts

    def ask(self, each: CellInputs | Probing) -> Examined:
        """Run the kernels that an input is for, and say what they err by; of another look only what is stored
        of the baseline. Nothing is kept but what is asked once a shape and length."""
        asked = list(range(len(self.candidates)) if each.candidates is None else each.candidates)
        references = list(dict.fromkeys(self.compared_with[i] for i in asked))
        known: dict[str, KernelEvidence | None] = {}
        told = Examined()
        if (kept := self.stored) is not None:
            again = isinstance(each, CellInputs) and each.look > 1
            if again and not all(kept.has(self.settings, spec, each) for spec in references):
                told.counts = 0
                return told
            known = {spec: kept.evidence(self.settings, spec, each) for spec in references}
        running = [spec for spec in references if spec not in known]
        kernels = [*(self.baselines[spec] for spec in running), *(self.candidates[i] for i in asked)]
        found: Sequence[KernelEvidence | None]
        if isinstance(each, Probing):
            if (why := why_not_one_hot(each.sizes)) is not None:
                told.few_words = f"one-hot probes of {each.shape} at {each.n_kv} keys left out: {why}"
            probed = probe_kernels(kernels, each, self.device, self.clock, strict=self.settings.strict)
            found = [None if one.refused else one for one in probed]
        else:
            found = examine(kernels, each, self.clock, self.share)
            say_what_is_hidden(each, found)
            if self.rooms and each.look == 1:
                with self.clock.stage("headroom", each.n_kv):
                    for i in asked:
                        self.rooms[i].add(each)
        told.contract = [one.contract for one in found if one is not None and one.contract]
        family = PROBES if isinstance(each, Probing) else each.family
        for kernel, one in zip(kernels, found, strict=True):
            if one is None and not (family in FORMS and kernel.spec in self.baselines):
                told.left_out.append((kernel.spec, family))
        for spec, one in zip(running, found, strict=False):
            if one is not None and isinstance(each, CellInputs):
                one.typical = self._typical_of(spec, each)
        if self.store is not None or known:
            for one in found:
                if one is not None:
                    one.seal()
        of_baseline = known | dict(zip(running, found, strict=False))
        if self.store is not None:
            for spec, one in of_baseline.items():
                self.store.keep(self.settings, spec, each, one)
        told.base_traces = {spec: one.trace for spec, one in of_baseline.items() if one is not None}
        inputs = each.inputs if isinstance(each, Probing) else each
        for i, one in zip(asked, found[len(running) :], strict=True):
            reference = of_baseline[self.compared_with[i]]
            if one is None or (reference is None and family not in FORMS):
                continue
            # A form is held against exact attention, whether or not the baseline has it.
            beside = reference or KernelEvidence(self.compared_with[i])
            told.cells.append((i, one.trace, compare(inputs, beside, one)))
        for one in found:
            if one is not None:
                # Outputs are compared above; only their errors are kept.
                one.output = one.exact = None
                if one.alone is not None:
                    one.alone.out = None
        return told

    def examine_all(self, inputs: Iterator[CellInputs | Probing]) -> None:
        """Ask of every input and keep what is found: on a CPU by as many processes as torch has threads."""
        seconds = self.clock.by_stage()

        def ask(each: CellInputs | Probing) -> Examined:
            found = self.ask(each)
            for _, _, cell in found.cells if processes > 1 else ():
                # Every process has them, and puts its own back: they are large.
                cell.inputs = None  # type: ignore[assignment]
            return found

        def closing() -> tuple[dict[tuple[str, int], float], dict[str, list[str]]]:
            notes = {kernel.spec: kernel.notes for kernel in self._kernels()}
            return self.clock.by_stage_since(seconds), notes

        def enter(told: tuple[dict[tuple[str, int], float], dict[str, list[str]]]) -> None:
            self.clock.add(told[0])
            for kernel in self._kernels():
                kernel.notes += [note for note in told[1][kernel.spec] if note not in kernel.notes]

        processes = self._processes()
        for each, found in answered(inputs, SharedWork(ask, closing, enter), processes):
            self.enter(each, found)

    def _kernels(self) -> list[Kernel]:
        return [*self.baselines.values(), *self.candidates]

    def _processes(self) -> int:
        """How many may share the inputs: one where something is kept from input to input, or a kernel is not
        wholly in this process."""
        keeps = self.store is not None or self.stored is not None or self.rooms
        if keeps or self.device.type != "cpu" or not hasattr(os, "fork"):
            return 1
        if not all(type(kernel) in (EagerKernel, FlashKernel) for kernel in self._kernels()):
            return 1
        return min(torch.get_num_threads(), _MOST_PROCESSES)

    def _typical_of(self, spec: str, each: CellInputs) -> float:
        """A baseline's error on plain inputs of this shape and length, which decides what is negligible: the
        same whatever else is asked. 0 where inputs come from elsewhere."""
        if self.settings.captured_from is not None:
            return 0.0
        key = spec, each.shape, each.n_kv
        if key not in self._typical:
            with self.clock.stage("plain inputs", each.n_kv):
                call = plain_call(self.settings, each.shape, each.n_kv, self.device)
                self._typical[key] = typical_error(self.baselines[spec], call)
        return self._typical[key]

    def judged(self) -> list[CandidateResult]:
        """The verdict on each candidate by what was examined so far."""
        return [
            _judge(self.settings, kernel.spec, baseline, cells, trace)
            for kernel, baseline, cells, trace in zip(
                self.candidates, self.compared_with, self.cells, self.traces, strict=True
            )
        ]

    def said(self) -> list[str]:
        """What was found that is no fault, and what could not be asked, each once."""
        shared = [f"{c.candidate.spec}: {c.shared}" for of in self.cells for c in of if c.shared]
        return list(dict.fromkeys([*self._contract, *shared, *self._few_words]))


def _learn(settings: DiffSettings, kernel: Kernel, device: torch.device, clock: StageClock) -> list[str]:
    """What is read off a kernel that states nothing, in sentences."""
    shapes = [shape for shape in map(shape_named, settings.shapes) if not shape.v_in_k]
    if not shapes:
        return []
    with clock.stage("identify", max((*settings.n_kvs, *settings.long_n_kvs))):
        return learn(
            kernel,
            list(dict.fromkeys(shape.heads for shape in shapes)),
            lengths_to_read(settings),
            path=settings.path,
            dtype=FLOAT_TYPES[settings.dtype].dtype,
            device=str(device),
            calls=[(settings.path, n) for n in (1, 2)] if is_asked_alone(kernel, settings.path) else (),
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
    strata = judge_cells(cells, settings.margin, settings.looks)
    alone = judge_alone(cells, settings.margin, settings.looks)
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
    for of_line in _by_line([c for c in cells if c.faults or not c.inputs.faults_alone]):
        of = of_line[0].inputs.shape, of_line[0].inputs.n_kv
        own, single = strata.only(*of), alone.only(*of) if alone is not None else None
        lines.append(LengthLine(of_line, decide(found(of_line, own, single)), own))
    evidence = found(cells, strata, alone)
    decision = decide(evidence)
    reasons = list(decision.reasons)
    if decision.verdict == "broken":
        reasons.append(_where([c for c in cells if c.faults], cells))
    reasons += limits_of(cells)
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
        looks=settings.looks,
        evidence=evidence,
    )


def _advice(settings: DiffSettings, strata: Judgement) -> str:
    """How much more would decide what is inconclusive."""
    if settings.captured_from is not None:
        return "more captured layers do not narrow it: one layer's rows are one kind of input"
    # Rows are doubled.
    looks = math.ceil(math.log2(strata.times)) if math.isfinite(strata.times) else math.inf
    if looks > math.log2(_MOST_ROWS / settings.rows):
        return f"no number of rows decides a ratio this near to the margin of {settings.margin:g}"
    return f"about --most-rows {settings.rows * 2 ** max(int(looks), settings.looks)} would decide"


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
