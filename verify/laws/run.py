"""Trying a law on many cases, and shrinking the case in which it fails.

pytest and `verify props` run laws through `run_law`, and so share the example database of hypothesis
(`.hypothesis/examples` in the current folder): a case that once failed is tried first the next time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import SkipTest

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given, reject, settings
from hypothesis.database import DirectoryBasedExampleDatabase, ExampleDatabase
from hypothesis.errors import Flaky, Unsatisfiable

from verify.kernels.errors import KernelFailure, MachineFailure, SpecError
from verify.laws.cases import Case, Problem
from verify.laws.draws import edges
from verify.laws.law import Law, LawBroken, Subject
from verify.machine.devices import is_out_of_memory

State = Literal["holds", "broken", "not applicable"]
DATABASE = ".hypothesis/examples"
# Nothing pinned.
_CHANCE: Mapping[str, Any] = {}
# Finding a smaller case is worth this much of a run.
SHRINK_SECONDS = 30
# A kernel that has taken none of so many cases takes none: each is drawn, and a worker asked.
MOST_REFUSED = 1000


@dataclass
class LawResult:
    """What came of one law."""

    law: Law  # that was asked
    state: State  # holds, broken, not applicable
    examples: int = 0  # cases tried until it held or failed
    margin: float = 0.0  # the tightest, in units of the tolerance
    reason: str = ""  # why it is not applicable, what broke it, or a reservation with which it holds
    case: Case | None = None  # the shrunk one that breaks it
    seconds: float = 0.0  # of the wall


def try_case(law: Law, subject: Subject, case: Case) -> LawResult:
    """One case of a law."""
    why = law.not_applicable(subject)
    if why is not None:
        return LawResult(law, "not applicable", reason=why)
    began = time.monotonic()
    try:
        result = LawResult(law, "holds", 1, law.check(subject, case))
    except (SpecError, MachineFailure):
        raise  # the case names an option that there is not; nothing was found out about the kernel
    except Exception as error:
        if is_out_of_memory(error):
            raise MachineFailure(f"{subject.spec}: too little memory: {error}", memory=True) from None
        state: State = "broken"
        if isinstance(error, KernelFailure) and error.kind == "unsupported":
            state = "not applicable"
        result = LawResult(law, state, 1, reason=said_by(error), case=case)
    result.seconds = time.monotonic() - began
    return result


def said_by(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, LawBroken):
        return str(error)
    if isinstance(error, KernelFailure):
        return f"the kernel {error.kind}: {error}"
    return f"raised {type(error).__name__}: {' '.join(str(error).split())}"


def register_profiles() -> None:
    """hypothesis profiles: `ci` (the same cases every time), `night`, `cuda`; load one to choose it."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    common: dict[str, Any] = {"deadline": None, "suppress_health_check": quiet}
    settings.register_profile("ci", max_examples=60, derandomize=True, **common)
    settings.register_profile("night", max_examples=10_000, **common)
    # Launches cost little there, compiling a new shape much: fewer cases.
    settings.register_profile("cuda", max_examples=30, derandomize=True, **common)


def run_law(
    law: Law,
    subject: Subject,
    *,
    examples: int | None = None,
    seed: int | None = None,
    database: ExampleDatabase | None = None,
    shrink: bool = True,
    on_case: Callable[[int], None] = lambda count: None,
) -> LawResult:
    """Try a law on this many cases (default: the loaded profile's), until one breaks it, and shrink that.

    Up to half of them are not left to chance: every family, and the edges of sizes (`draws.edges`). seed: of
    the cases (default: the profile's own choice); database: of cases that failed before.
    """
    why = law.not_applicable(subject)
    if why is not None:
        return LawResult(law, "not applicable", reason=why)
    result = LawResult(law, "holds")
    refused, hung, refusals = "", False, 0
    subject.kernel.forgive()
    began = time.monotonic()
    deadline = float("inf")
    found: tuple[Case, str] | None = None

    def hold(case: Case) -> None:
        nonlocal refused, refusals, deadline, found, hung
        if found is not None and (hung or (time.monotonic() > deadline and case != found[0])):
            # Shrunk enough, or every case would be waited for: whatever is smaller counts as right.
            return
        try:
            margin = law.check(subject, case)
        except MachineFailure as failed:
            raise _Stopped(failed) from None
        except Exception as error:
            if is_out_of_memory(error):
                said = f"{subject.spec}: too little memory: {error}"
                raise _Stopped(MachineFailure(said, memory=True)) from None
            if isinstance(error, KernelFailure) and error.kind == "unsupported":
                refused, refusals = str(error), refusals + 1
                if refusals >= MOST_REFUSED and not result.examples:
                    raise _NoneTaken from None
                reject()
            hung = isinstance(error, KernelFailure) and error.kind == "hung"
            fail(case, said_by(error))
        else:
            if found is None:
                result.examples += 1
                result.margin = max(result.margin, margin)
                on_case(result.examples)

    def fail(case: Case, said: str) -> None:
        nonlocal found, deadline
        if found is None:
            result.examples += 1
            deadline = time.monotonic() + SHRINK_SECONDS
        found = (case, said)
        raise LawBroken(said)

    default = settings.default
    assert default is not None
    total = examples or default.max_examples
    keep = database if database is not None else default.database
    if seed is None and default.derandomize:
        seed = 0
    # What failed before is kept by law and kernel: the function that hypothesis tries is one for all.
    name = f"{law.name} {subject.spec}"

    def trial(phases: Sequence[Phase], most: int, pinned: Mapping[str, Any] = _CHANCE) -> None:
        """Hypothesis on cases of the law, the pinned fields not left to chance."""
        skipped = not pinned

        def tried(case: Case) -> None:
            nonlocal skipped
            if not skipped:
                # The first case has the simplest of everything that is not pinned: chance has that too.
                skipped = True
                return
            hold(case)

        chosen = settings(
            default,
            max_examples=most,
            phases=[*phases, *([Phase.shrink] if shrink else [])],
            derandomize=False,
            database=None if keep is None or pinned else _KeptFor(name, keep),
            deadline=None,
            # Calls that a kernel does not take are drawn again, as often as it takes.
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            verbosity=Verbosity.quiet,
        )
        test: Any = given(law.cases(replace(subject, pinned=pinned)))(tried)
        chosen(test if seed is None else hypothesis.seed(seed)(test))()

    def simpler() -> None:
        """A case that chance finds and shrinks further than the pinned fields allow, if it finds one."""
        nonlocal found, deadline
        at_edge, count, deadline, found = found, result.examples, float("inf"), None
        with suppress(LawBroken, Flaky, Unsatisfiable):
            trial([Phase.generate], total)
        found, result.examples = found or at_edge, count

    try:
        if keep is not None:
            # Nothing was kept: hypothesis says that there is nothing to try.
            with suppress(Unsatisfiable, SkipTest):
                trial([Phase.reuse], total)
        of_edges = None if keep is None else _KeptFor(f"{name} edges", keep)
        for pinned in _edges(law, subject, total // 2, of_edges):
            try:
                with suppress(Unsatisfiable):
                    trial([Phase.generate], 2, pinned)
            except (LawBroken, Flaky):
                if shrink and not hung:
                    simpler()
                raise
        trial([Phase.generate], max(total - result.examples, 1))
    except (LawBroken, Flaky):
        # Flaky: it failed once and not again, as a race does.
        assert found is not None
        result.state, result.case, result.reason = "broken", *found
    except _Stopped as stopped:
        raise stopped.failure from None
    except (Unsatisfiable, _NoneTaken):
        if not result.examples:
            result.state, result.reason = (
                "not applicable",
                refused or "no case that this kernel takes was found",
            )
    cases, differed = subject.compared.get(law.name, (0, 0))
    if result.state == "holds" and differed:
        result.reason = f"bits differed in {differed} of {cases} cases, within the budget"
    result.seconds = time.monotonic() - began
    return result


def _edges(
    law: Law, subject: Subject, most: int, kept: ExampleDatabase | None
) -> Iterator[Mapping[str, Any]]:
    """The fields that are not left to chance, a case each: those that failed before come first. Of more than
    there is room for, some, evenly. kept: where those are named that fail."""
    if law.case_type is not Problem:
        return
    found = edges(subject)
    failed = {bytes(text) for text in kept.fetch(b"failed")} if kept is not None else set()
    count = min(most, len(found))
    some = [found[i * len(found) // count] for i in range(count)]
    first = [each for each in found if json.dumps(each).encode() in failed]
    for each in [*first, *(each for each in some if each not in first)]:
        if kept is not None:
            kept.save(b"failed", json.dumps(each).encode())
        yield each
        # Gone on with, it has not failed.
        if kept is not None:
            kept.delete(b"failed", json.dumps(each).encode())


class _KeptFor(ExampleDatabase):
    """A part of a database: its keys begin with a name."""

    def __init__(self, name: str, whole: ExampleDatabase) -> None:
        super().__init__()
        self._name, self._whole = name.encode() + b" ", whole

    def save(self, key: bytes, value: bytes) -> None:
        self._whole.save(self._name + key, value)

    def fetch(self, key: bytes) -> Iterable[bytes]:
        return self._whole.fetch(self._name + key)

    def delete(self, key: bytes, value: bytes) -> None:
        self._whole.delete(self._name + key, value)


class _NoneTaken(BaseException):
    """As `_Stopped`: the kernel takes no case of the law."""


class _Stopped(BaseException):
    """Passes through hypothesis at once, which tries and shrinks on after an Exception."""

    def __init__(self, failure: MachineFailure) -> None:
        super().__init__(failure)
        self.failure = failure


def kept_examples() -> ExampleDatabase:
    """The database of cases that failed before, in the current folder."""
    return DirectoryBasedExampleDatabase(DATABASE)
