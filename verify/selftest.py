"""The mutation score: which of our detectors sees which known fault, and whether any sees a clean kernel.

Every fault of `verify.kernels.faults` and every clean variant runs over every input family and every probe,
with as many seeds as asked for; of a fault of plans the laws of plans are asked too, and of a kernel that has
a merge of its own those of merges. A fault of how calls are made is shown those that show it, and clean
variants those of every form. A fault is caught if some detector that is sure by itself objects with
every seed; a clean variant must make none of them object.
The same results are judged once more as those of a kernel of which nothing is stated, as a `py:` kernel is by
default: by the loosest arithmetic, and where that hides a fault by what is read off the kernel, as every
command reads such a kernel first. The gates of other projects are asked about the same results: on Gaussian
inputs, which is what they are run on, and on all families.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from verify.kernels.budget.arithmetic import Arithmetic, loosest_of
from verify.kernels.budget.bound import Budget, error_budget, rounding_key
from verify.kernels.call import Call
from verify.kernels.eager import EagerKernel
from verify.kernels.errors import KernelFailure
from verify.kernels.faults import FAULTS, PLAN_FAULTS, VARIANTS, Fault
from verify.kernels.faults.tile_kernel import TileKernel
from verify.kernels.heads import Heads
from verify.kernels.identify.arithmetics import KnownReadings, coarser
from verify.kernels.identify.asking import NotIdentifiable, Regime, bare
from verify.kernels.identify.reading import read
from verify.kernels.judging.detectors import (
    DETECTORS,
    SUSPICIONS,
    Detector,
    Finding,
    determinism_finding,
    findings,
    measure,
    trace_finding,
)
from verify.kernels.judging.families import ALL_FAMILIES, FAMILIES, FORMS, draw
from verify.kernels.judging.gates import GATES, compared, plain_attention, verdicts
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.probes import Probe, far_offsets, judge, standard_probes
from verify.kernels.kernel import Kernel
from verify.kernels.plans.plan import RowPlan
from verify.kernels.plans.spec import parse_plan, parse_spec
from verify.kernels.plans.tile_options import TileOptions
from verify.kernels.trace import heads_launched_alike
from verify.laws import LAWS, Subject, subject_of
from verify.laws.run import run_law

DEFAULT_SEEDS = 2
# Each computes on one thread, and takes half a gigabyte.
MOST_PROCESSES = 4
# Two sequences; rows that end inside a tile, on its edge, one key after it, and one that sees nothing.
SIZES = InputSizes(n_kv=(257, 200, 64, 1, 0), batch=2)
# Another head size, and values of another size than keys.
OTHER_SIZES = InputSizes(
    n_kv=(97, 33), heads=Heads.grouped(kv=1, ratio=6, k_size=128, v_size=32), edges=(32, 64)
)
# Enough keys for accumulators to lose what they lose.
LONG_SIZES = InputSizes(
    n_kv=(2048,), heads=Heads.grouped(kv=1, ratio=6, k_size=64, v_size=64), edges=(64, 1024)
)
# Rows that share tiles.
PREFILL_SIZES = dataclasses.replace(OTHER_SIZES, path="prefill")
OTHER_FAMILIES = ("gaussian", "needles")
# Kinds of calls, after the families of the same sizes.
SELFTEST_CALLS = ("sequences", "shorter")
# Of a fault of how calls are made, and of every form of a call: sequences have 50 keys and more.
CALL_SIZES = InputSizes(n_kv=(257, 200, 64, 50), batch=2)
FORM_SIZES = dataclasses.replace(CALL_SIZES, n_kv=(130, 64, 65, 50), path="several")
# Plans to draw for each law of plans.
PLAN_CASES = 200
# Lists of parts to draw for each law of merges.
MERGE_CASES = 40


@dataclass
class SelftestSubject:
    """A fault or a clean variant, and what was found. Counts are of seeds."""

    name: str  # unique
    kind: str  # fault or clean
    what: str  # one sentence
    references: tuple[str, ...] = ()  # issues where it was seen
    plan: str = ""  # that it lives in
    detectors: dict[Detector, int] = field(default_factory=dict)  # with which each objected
    caught: int = 0  # with which a sure detector did
    gates: dict[str, int] = field(default_factory=dict)  # with which each gate refused it on Gaussian inputs
    gates_any: dict[str, int] = field(default_factory=dict)  # on any family
    # Each detector's first objection, and the input it was about.
    said: dict[Detector, str] = field(default_factory=dict)
    unstated: int = 0  # with which a sure detector objected though no arithmetic was stated
    unstated_said: dict[Detector, str] = field(default_factory=dict)  # the first objection of each then
    read: bool = False  # what was read off it had to show it
    skipped: str = ""  # why it did not run


@dataclass
class SelftestResult:
    """All subjects, and what they amount to."""

    seeds: int
    seconds: float
    subjects: list[SelftestSubject]

    @property
    def faults(self) -> list[SelftestSubject]:
        return [s for s in self.subjects if s.kind == "fault" and not s.skipped]

    @property
    def missed(self) -> list[SelftestSubject]:
        """Faults that some seed does not show."""
        return [s for s in self.faults if s.caught < self.seeds]

    @property
    def false_alarms(self) -> list[SelftestSubject]:
        """Clean variants that a sure detector objects to."""
        return [s for s in self.subjects if s.kind == "clean" and s.caught]

    @property
    def missed_unstated(self) -> list[SelftestSubject]:
        """Faults that some seed does not show where nothing is stated of the arithmetic."""
        return [s for s in self.faults if s.unstated < self.seeds]

    @property
    def false_alarms_unstated(self) -> list[SelftestSubject]:
        """Clean variants that a sure detector objects to where nothing is stated."""
        return [s for s in self.subjects if s.kind == "clean" and s.unstated]

    @property
    def score(self) -> float:
        """Share of the faults that ran which every seed caught."""
        return 1 - len(self.missed) / max(len(self.faults), 1)

    @property
    def exit_code(self) -> int:
        wrong = (self.missed, self.missed_unstated, self.false_alarms, self.false_alarms_unstated)
        return 1 if any(wrong) else 0

    def gate_score(self, name: str, *, everywhere: bool = False) -> int:
        """Faults that a gate refuses with every seed: on Gaussian inputs, or on any family."""
        return sum((s.gates_any if everywhere else s.gates)[name] == self.seeds for s in self.faults)

    def gate_false_alarms(self, name: str) -> int:
        """Clean variants that a gate refuses, with any seed, on Gaussian inputs."""
        return sum(s.gates[name] > 0 for s in self.subjects if s.kind == "clean")

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "command": "selftest",
            "exit_code": self.exit_code,
            "mutation_score": self.score,
            "seeds": self.seeds,
            "seconds": self.seconds,
            "faults": len(self.faults),
            "missed": [s.name for s in self.missed],
            "false_alarms": [s.name for s in self.false_alarms],
            "missed_unstated": [s.name for s in self.missed_unstated],
            "false_alarms_unstated": [s.name for s in self.false_alarms_unstated],
            "foreign_gates": {
                g.name: {
                    "rule": g.rule,
                    "faults_on_gaussian": self.gate_score(g.name),
                    "faults_on_all_families": self.gate_score(g.name, everywhere=True),
                    "clean_variants_refused": self.gate_false_alarms(g.name),
                }
                for g in GATES
            },
            "subjects": [dataclasses.asdict(s) for s in self.subjects],
        }


class _Input:
    """One call, with everything about it that does not depend on the kernel."""

    def __init__(self, family: str, sizes: InputSizes, seed: int, device: torch.device | str) -> None:
        self.family, self.name = (
            family,
            f"{family}, n_kv {max(sizes.n_kv)}, head size {sizes.heads.k_size}, {sizes.path}",
        )
        self.call: Call = draw(family, sizes, seed, device=device)
        self.distinct = ALL_FAMILIES[family].distinct
        self.plain = plain_attention(self.call)
        self._budgets: dict[Any, Budget] = {}

    def budget(self, arithmetic: Arithmetic) -> Budget:
        """Kernels that round alike at these n_kv share a budget."""
        key = rounding_key(arithmetic, self.call.kv_len.unique().tolist())
        if key not in self._budgets:
            self._budgets[key] = error_budget(self.call, arithmetic)
        return self._budgets[key]


def run_selftest(
    seeds: int = DEFAULT_SEEDS,
    *,
    device: torch.device | str = "cpu",
    only: Callable[[str], bool] = lambda name: True,
    progress: Callable[[str], None] = lambda text: None,
    identified: bool = False,
) -> SelftestResult:
    """Run every fault and every variant (`only`: those whose name it accepts) with seeds 0 .. seeds-1.

    identified: where nothing is stated, judge by what is read off every kernel, and not by the loosest, which
    takes three times as long.
    """
    threads = torch.get_num_threads()
    # Tensors are small here: threads would mostly wait for each other.
    torch.set_num_threads(1)
    try:
        return _run(seeds, device, only, progress, identified)
    finally:
        torch.set_num_threads(threads)


def run_selftest_in_processes(
    seeds: int = DEFAULT_SEEDS,
    *,
    processes: int,
    only: Callable[[str], bool] = lambda name: True,
    progress: Callable[[str], None] = lambda text: None,
) -> SelftestResult:
    """`run_selftest` on the CPU by so many processes, each with a share of the subjects: the same result.

    This process takes the first share, and tells of it; an interrupt ends the others.
    """
    began = time.monotonic()
    names = [name for trial in _trials() if only(name := trial.subject.name)]
    shares = [frozenset(names[i::processes]) for i in range(processes)]
    with multiprocessing.get_context("spawn").Pool(max(processes - 1, 1), initializer=_leave_signals) as pool:
        others = [pool.apply_async(_share_of, (seeds, share)) for share in shares[1:] if share]
        subjects = run_selftest(seeds, only=shares[0].__contains__, progress=progress).subjects
        progress("what the other processes found")
        for other in others:
            subjects += other.get()
    by_name = {subject.name: subject for subject in subjects}
    return SelftestResult(seeds, time.monotonic() - began, [by_name[name] for name in names])


def _leave_signals() -> None:
    """An interrupt is for the process that waits: it ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _share_of(seeds: int, names: frozenset[str]) -> list[SelftestSubject]:
    return run_selftest(seeds, only=names.__contains__).subjects


def _run(
    seeds: int,
    device: torch.device | str,
    only: Callable[[str], bool],
    progress: Callable[[str], None],
    identified: bool,
) -> SelftestResult:
    began = time.monotonic()
    on_gpu = torch.device(device).type == "cuda"
    trials = [trial for trial in _trials() if only(trial.subject.name)]
    for subject in (trial.subject for trial in trials):
        subject.detectors = dict.fromkeys(DETECTORS, 0)
        subject.gates = {g.name: 0 for g in GATES}
        subject.gates_any = dict(subject.gates)
    probes = standard_probes(SIZES, device=device) + standard_probes(OTHER_SIZES, device=device)
    known = {
        trial.subject.name: _read(trial.build(), device) if identified else KnownReadings(())
        for trial in trials
    }
    for seed in range(seeds):
        inputs = list(_inputs(seed, device))
        formed = [_Input(family, FORM_SIZES, seed, device) for family in FORMS]
        for trial in trials:
            if trial.needs == "cuda" and not on_gpu:
                trial.subject.skipped = "needs a GPU"
                continue
            progress(f"seed {seed + 1} of {seeds}: {trial.subject.name}")
            used = [x for x in inputs if x.family not in trial.without]
            if seed == 0 and trial.subject.kind == "clean" and _takes_forms(trial.build()):
                used += formed
            if trial.shown is not None:
                used = [
                    _Input(
                        family, dataclasses.replace(CALL_SIZES, path=path, **trial.shown.sizes), seed, device
                    )
                    for path in trial.shown.paths
                    for family in trial.shown.families
                ]
                _one_seed(trial, used, [], seed, known[trial.subject.name])
                continue
            chosen = [far_offsets(SIZES, device=device)] if trial.probes == "far offsets" else probes
            _one_seed(trial, used, chosen, seed, known[trial.subject.name])
    hidden = [t for t in trials if t.subject.kind == "fault" and t.subject.unstated < seeds]
    for trial in hidden if not identified else ():
        if not trial.subject.skipped:
            progress(f"read off it: {trial.subject.name}")
            _by_what_is_read(trial, probes, seeds, device)
    return SelftestResult(seeds, time.monotonic() - began, [trial.subject for trial in trials])


def _by_what_is_read(trial: _Trial, probes: list[Probe], seeds: int, device: torch.device | str) -> None:
    """Judge a fault that the loosest arithmetic hides once more, by what is read off its kernel."""
    subject, known = trial.subject, _read(trial.build(), device)
    again = trial._replace(subject=dataclasses.replace(subject, unstated=0, unstated_said={}))
    again.subject.detectors = dict(subject.detectors)
    again.subject.gates, again.subject.gates_any = dict(subject.gates), dict(subject.gates_any)
    for seed in range(seeds):
        used = [x for x in _inputs(seed, device) if x.family not in trial.without]
        chosen = [far_offsets(SIZES, device=device)] if trial.probes == "far offsets" else probes
        _one_seed(again, used, chosen, seed, known)
    subject.unstated, subject.unstated_said = again.subject.unstated, again.subject.unstated_said
    subject.read = True


class _Trial(NamedTuple):
    """A subject, how its kernel is built, and what it is shown to."""

    subject: SelftestSubject  # what is found goes into it
    build: Callable[[], Kernel]  # makes the kernel
    needs: str = ""  # what it cannot run without
    probes: str = "standard"  # which of them show it
    # Families of inputs that it is not made for.
    without: tuple[str, ...] = ()
    # What the laws of plans are asked of, where plans are what is wrong.
    plans: Subject | None = None
    shown: Fault | None = None  # a fault of how calls are made, which says what shows it


def _trials() -> Iterator[_Trial]:
    """Every fault, every fault of plans in an `eager` that is otherwise right, and every clean variant."""
    for fault in FAULTS:
        subject = SelftestSubject(fault.name, "fault", fault.what, fault.references, fault.plan)
        shown = fault if fault.families else None
        yield _Trial(subject, fault.build, needs=fault.needs, probes=fault.probes, shown=shown)
    for broken in PLAN_FAULTS:
        subject = SelftestSubject(broken.name, "fault", broken.what, broken.references, broken.plan)
        spec = f"eager:{broken.plan}"
        options = TileOptions(plan=broken.breaks(parse_plan(parse_spec(spec))))
        yield _Trial(
            subject, partial(EagerKernel, spec, options), plans=subject_of("eager").with_plans(broken.breaks)
        )
    for v in VARIANTS:
        yield _Trial(SelftestSubject(v.name, "clean", v.what), v.build, without=v.without)


def _takes_forms(kernel: Kernel) -> bool:
    return kernel.capabilities().lacks("paged", "packed", "mask", "key_list") is None


def _inputs(seed: int, device: torch.device | str) -> Iterator[_Input]:
    for family in FAMILIES:
        yield _Input(family, SIZES, seed, device)
    for family in SELFTEST_CALLS:
        yield _Input(family, SIZES, seed, device)
    for family in OTHER_FAMILIES:
        yield _Input(family, OTHER_SIZES, seed, device)
    yield _Input("gaussian", LONG_SIZES, seed, device)
    yield _Input("needles", PREFILL_SIZES, seed, device)


def _one_seed(
    trial: _Trial, inputs: list[_Input], probes: list[Probe], seed: int, known: KnownReadings
) -> None:
    subject, kernel = trial.subject, trial.build()
    objected: set[Detector] = set()
    unstated: set[Detector] = set()

    def object_to(finding: Finding, where: str, *, stated: bool = True, assumed: bool = True) -> None:
        said = f"{finding.said} ({where})" if where else finding.said
        if stated:
            objected.add(finding.detector)
            subject.said.setdefault(finding.detector, said)
        if assumed:
            unstated.add(finding.detector)
            subject.unstated_said.setdefault(finding.detector, said)

    for said in coarser(known.readings):
        object_to(Finding("rms", said), "", stated=False)
    for probe in probes:
        try:
            result = kernel.run(probe.call)
        except KernelFailure as failure:
            object_to(Finding("probe", str(failure)), "")
            continue
        for stated, arithmetic in _arithmetics(kernel, probe.call, known):
            for wrong in judge(probe, result, arithmetic, most=1):
                object_to(Finding("probe", str(wrong)), "", stated=stated, assumed=not stated)
    if trial.plans is not None:
        for law in (law for law in LAWS.values() if law.group == "plans"):
            done = run_law(law, trial.plans, examples=PLAN_CASES, seed=seed, shrink=False)
            if done.state == "broken":
                object_to(Finding("law", done.reason), law.name)
    if isinstance(kernel, TileKernel) and type(kernel).merge is not TileKernel.merge:
        # A merge of its own: it answers for itself. One more part, though empty, makes another tree: of bits
        # that do not move then a merge of all parts at once promises nothing.
        alone = subject_of(kernel)
        for law in (x for x in LAWS.values() if x.group == "merge" and x.name != "merge-identity"):
            done = run_law(law, alone, examples=MERGE_CASES, seed=seed, shrink=False)
            if done.state == "broken":
                object_to(Finding("law", done.reason), law.name)
    refused: set[str] = set()
    refused_gaussian: set[str] = set()
    for x in inputs:
        result = kernel.run(x.call)
        for stated, arithmetic in _arithmetics(kernel, x.call, known):
            measured = measure(
                x.call,
                result,
                arithmetic,
                distinct=x.distinct,
                budget=x.budget(arithmetic),
                heads_alike=heads_launched_alike(result.launched.rows),
            )
            for finding in findings(measured):
                object_to(finding, x.name, stated=stated, assumed=not stated)
        if x.family == "gaussian":
            for found in (
                determinism_finding(kernel, x.call, result),
                trace_finding(result.launched, _asked(kernel, x.call)),
            ):
                if found is not None:
                    object_to(found, x.name)
        exact = x.budget(kernel.arithmetic_of(x.call)).out
        passed = verdicts(compared(x.call, result.out, exact, x.plain))
        failed = {name for name, ok in passed.items() if not ok}
        refused |= failed
        if x.family == "gaussian":
            refused_gaussian |= failed
    for detector in objected:
        subject.detectors[detector] += 1
    subject.caught += bool(objected - SUSPICIONS)
    subject.unstated += bool(unstated - SUSPICIONS)
    for name in refused:
        subject.gates_any[name] += 1
    for name in refused_gaussian:
        subject.gates[name] += 1


def _read(kernel: Kernel, device: torch.device | str) -> KnownReadings:
    """What can be read off a kernel at some of the lengths that it is shown."""
    found = []
    for n_kv, heads in (
        (64, SIZES.heads),
        (SIZES.n_kv[0], SIZES.heads),
        (LONG_SIZES.n_kv[0], LONG_SIZES.heads),
    ):
        regime = Regime(
            n_kv=n_kv, ratio=heads.ratio, kv_heads=heads.kv, size=heads.v_size, k_size=heads.k_size,
            device=str(device),
        )  # fmt: skip
        with suppress(NotIdentifiable):
            found.append(read(bare(kernel, "decode"), regime))
    return KnownReadings(tuple(found))


def _arithmetics(kernel: Kernel, call: Call, known: KnownReadings) -> tuple[tuple[bool, Arithmetic], ...]:
    """The kernel's own, which is stated, and what is read off it, or assumed of a `py:` kernel that returns
    the same type."""
    if (seen := known.at(call)) is not None:
        return (True, kernel.arithmetic_of(call)), (False, seen)
    own = kernel.arithmetic_of(call)
    assumed = loosest_of(call.q.dtype)
    return (True, own), (False, assumed if own.out == "f32" else dataclasses.replace(assumed, out=own.out))


def _asked(kernel: Kernel, call: Call) -> Callable[[int], RowPlan]:
    """The plan that the kernel was asked for, by n_kv."""
    assert isinstance(kernel, TileKernel | EagerKernel)
    plan = kernel.plan if isinstance(kernel, TileKernel) else kernel.options.plan
    return lambda n: plan.at(call.shape.asked("decode").of_keys(n))
