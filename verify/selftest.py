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
from verify.machine.processes import SharedWork, answered

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


class _Budgets:
    """The budgets of a call. Kernels that round alike at its n_kv share one."""

    def __init__(self, call: Call) -> None:
        self._call, self._made = call, dict[Any, Budget]()

    def of(self, arithmetic: Arithmetic) -> Budget:
        key = rounding_key(arithmetic, self._call.n_kv.unique().tolist())
        if key not in self._made:
            self._made[key] = error_budget(self._call, arithmetic)
        return self._made[key]


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
        self.budgets = _Budgets(self.call)


def run_selftest(
    seeds: int = DEFAULT_SEEDS,
    *,
    device: torch.device | str = "cpu",
    processes: int = 1,
    only: Callable[[str], bool] = lambda name: True,
    progress: Callable[[str], None] = lambda text: None,
    identified: bool = False,
) -> SelftestResult:
    """Run every fault and every variant (`only`: those whose name it accepts) with seeds 0 .. seeds-1.

    processes: so many share the subjects, on a CPU; the result is the same. progress: told of what this one
    takes. identified: where nothing is stated, judge by what is read off every kernel, and not by the
    loosest, which takes three times as long.
    """
    threads = torch.get_num_threads()
    # Tensors are small here: threads would mostly wait for each other.
    torch.set_num_threads(1)
    try:
        return _run(seeds, torch.device(device), processes, only, progress, identified)
    finally:
        torch.set_num_threads(threads)


def _run(
    seeds: int,
    device: torch.device,
    processes: int,
    only: Callable[[str], bool],
    progress: Callable[[str], None],
    identified: bool,
) -> SelftestResult:
    began = time.monotonic()
    trials = [trial for trial in _trials() if only(trial.subject.name)]
    for subject in (trial.subject for trial in trials):
        subject.detectors = dict.fromkeys(DETECTORS, 0)
        subject.gates = {g.name: 0 for g in GATES}
        subject.gates_any = dict(subject.gates)
    runnable = [trial for trial in trials if trial.needs != "cuda" or device.type == "cuda"]
    for trial in trials:
        trial.subject.skipped = "" if trial in runnable else "needs a GPU"
    shown = _Shown(device)
    known = {}
    if identified:
        known = {trial.subject.name: _read(trial.build(), device) for trial in runnable}

    def ask(each: tuple[int, _Trial]) -> _SeedFound:
        seed, trial = each
        return _one_seed(trial, seed, shown, known.get(trial.subject.name, KnownReadings(())))

    def ask_by_what_is_read(trial: _Trial) -> list[_SeedFound]:
        read_off = _read(trial.build(), device)
        return [_one_seed(trial, seed, shown, read_off) for seed in range(seeds)]

    def tell(each: tuple[int, _Trial]) -> None:
        progress(f"seed {each[0] + 1} of {seeds}: {each[1].subject.name}")

    of_seeds = ((seed, trial) for seed in range(seeds) for trial in runnable)
    for (_, trial), found in answered(of_seeds, SharedWork(ask, tell=tell), processes):
        _count(trial.subject, found)
    # What the loosest arithmetic hides is judged once more.
    hidden = [t for t in runnable if t.subject.kind == "fault" and t.subject.unstated < seeds]
    again = SharedWork(ask_by_what_is_read, tell=lambda trial: progress(f"read off it: {trial.subject.name}"))
    for trial, of_each in answered(iter([] if identified else hidden), again, min(processes, len(hidden))):
        subject = trial.subject
        subject.read, subject.unstated, subject.unstated_said = True, 0, {}
        for found in of_each:
            _count_unstated(subject, found)
    return SelftestResult(seeds, time.monotonic() - began, [trial.subject for trial in trials])


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


class _Shown:
    """What subjects are shown: inputs of one seed at a time, since each takes its megabytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        standard = standard_probes(SIZES, device=device) + standard_probes(OTHER_SIZES, device=device)
        self.probes = [(probe, _Budgets(probe.call)) for probe in standard]
        self._seed: int | None = None
        self._inputs: list[_Input] = []
        self._formed: list[_Input] = []

    def inputs(self, trial: _Trial, seed: int) -> list[_Input]:
        if trial.shown is not None:
            return [
                _Input(
                    family, dataclasses.replace(CALL_SIZES, path=path, **trial.shown.sizes), seed, self.device
                )
                for path in trial.shown.paths
                for family in trial.shown.families
            ]
        if seed != self._seed:
            self._seed, self._inputs, self._formed = seed, list(_inputs(seed, self.device)), []
        used = [x for x in self._inputs if x.family not in trial.without]
        if seed == 0 and trial.subject.kind == "clean" and _takes_forms(trial.build()):
            self._formed = self._formed or [_Input(family, FORM_SIZES, seed, self.device) for family in FORMS]
            used += self._formed
        return used

    def probes_of(self, trial: _Trial) -> list[tuple[Probe, _Budgets]]:
        if trial.shown is not None:
            return []
        if trial.probes != "far offsets":
            return self.probes
        far = far_offsets(SIZES, device=self.device)
        return [(far, _Budgets(far.call))]


def _inputs(seed: int, device: torch.device) -> Iterator[_Input]:
    for family in FAMILIES:
        yield _Input(family, SIZES, seed, device)
    for family in SELFTEST_CALLS:
        yield _Input(family, SIZES, seed, device)
    for family in OTHER_FAMILIES:
        yield _Input(family, OTHER_SIZES, seed, device)
    yield _Input("gaussian", LONG_SIZES, seed, device)
    yield _Input("needles", PREFILL_SIZES, seed, device)


class _SeedFound(NamedTuple):
    """What one seed shows of a subject."""

    said: dict[Detector, str]  # the first objection of each
    unstated_said: dict[Detector, str]  # where no arithmetic is stated
    refused: set[str]  # gates
    refused_gaussian: set[str]  # those that refused it on Gaussian inputs


def _one_seed(trial: _Trial, seed: int, shown: _Shown, known: KnownReadings) -> _SeedFound:
    kernel = trial.build()
    found = _SeedFound({}, {}, set(), set())

    def object_to(finding: Finding, where: str, *, stated: bool = True, assumed: bool = True) -> None:
        said = f"{finding.said} ({where})" if where else finding.said
        if stated:
            found.said.setdefault(finding.detector, said)
        if assumed:
            found.unstated_said.setdefault(finding.detector, said)

    for said in coarser(known.readings):
        object_to(Finding("rms", said), "", stated=False)
    for probe, budgets in shown.probes_of(trial):
        try:
            result = kernel.run(probe.call)
        except KernelFailure as failure:
            object_to(Finding("probe", str(failure)), "")
            continue
        for stated, arithmetic in _arithmetics(kernel, probe.call, known):
            budget = None if probe.demand == "bits" else budgets.of(arithmetic)
            for wrong in judge(probe, result, arithmetic, most=1, budget=budget):
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
    for x in shown.inputs(trial, seed):
        result = kernel.run(x.call)
        for stated, arithmetic in _arithmetics(kernel, x.call, known):
            measured = measure(
                x.call,
                result,
                arithmetic,
                distinct=x.distinct,
                budget=x.budgets.of(arithmetic),
                heads_alike=heads_launched_alike(result.launched.rows),
            )
            for finding in findings(measured):
                object_to(finding, x.name, stated=stated, assumed=not stated)
        if x.family == "gaussian":
            for seen in (
                determinism_finding(kernel, x.call, result),
                trace_finding(result.launched, _asked(kernel, x.call)),
            ):
                if seen is not None:
                    object_to(seen, x.name)
        exact = x.budgets.of(kernel.arithmetic_of(x.call)).out
        passed = verdicts(compared(x.call, result.out, exact, x.plain))
        failed = {name for name, ok in passed.items() if not ok}
        found.refused.update(failed)
        if x.family == "gaussian":
            found.refused_gaussian.update(failed)
    return found


def _count(subject: SelftestSubject, found: _SeedFound) -> None:
    """Seeds in their order: the first objection of a detector is what is said."""
    for detector, said in found.said.items():
        subject.detectors[detector] += 1
        subject.said.setdefault(detector, said)
    subject.caught += bool(found.said.keys() - SUSPICIONS)
    for name in found.refused:
        subject.gates_any[name] += 1
    for name in found.refused_gaussian:
        subject.gates[name] += 1
    _count_unstated(subject, found)


def _count_unstated(subject: SelftestSubject, found: _SeedFound) -> None:
    for detector, said in found.unstated_said.items():
        subject.unstated_said.setdefault(detector, said)
    subject.unstated += bool(found.unstated_said.keys() - SUSPICIONS)


def _read(kernel: Kernel, device: torch.device) -> KnownReadings:
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
