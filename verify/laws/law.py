"""What a law is, what it is asked of, and how it fails.

A law is a named function of a subject (a kernel, its merge, its plans) and a case; the case is drawn by
hypothesis and shrinks to a readable one. It returns the tightest margin that it saw, in units of its
tolerance: 0 where bits were equal, at most 1 where it holds. Beyond that it raises `LawBroken`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_type_hints

import torch
from hypothesis.strategies import SearchStrategy

from verify.identify.learning import learn_as_asked, states_nothing
from verify.kernels.call import AttentionOutput
from verify.kernels.capabilities import FORMS, Capabilities, Promise
from verify.kernels.foreign.function_kernel import FunctionKernel
from verify.kernels.heads import Heads
from verify.kernels.judging.contract import empty_merge_finding, empty_row_finding
from verify.kernels.kernel import Kernel
from verify.kernels.merge import Merge
from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.plans.plan import Plan
from verify.kernels.plans.spec import PLAN_OPTIONS, parse_plan, parse_spec, replaced, with_options
from verify.kernels.registry import build_kernel
from verify.laws.cases import Case, Problem

Group = Literal["merge", "parts", "attention", "options", "forms", "cache", "plans"]
GROUPS: tuple[Group, ...] = ("merge", "parts", "attention", "options", "forms", "cache", "plans")
Options = Mapping[str, str]
# Head sizes that problems are drawn with, smallest first.
HEAD_SIZES = (16, 32, 64, 128)


def head_sizes(has: Capabilities) -> list[int]:
    """Those of `HEAD_SIZES` that a kernel takes for keys, or the first that it states."""
    some = [n for n in HEAD_SIZES if n % has.size_multiple == 0 and (has.k_sizes is None or n in has.k_sizes)]
    return some or [has.k_sizes[0] if has.k_sizes else has.size_multiple]


# Visible keys of the row of a kernel's first call.
FIRST_CALL = (33,)


class LawBroken(AssertionError):
    """A case in which a law does not hold: one sentence with what was found and what was due."""


@dataclass
class Subject:
    """What laws are asked of."""

    spec: str  # of the kernel
    kernel: Kernel  # as it was asked for
    variant: Callable[[Options], Kernel]  # the same with other options in its specification
    capabilities: Capabilities  # what it states, less what it turned out to lack
    merge: Merge | None  # its merge, where it can be called by itself
    plan: Callable[[Options], Plan] | None  # the plan that options stand for, where it takes any
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # that calls lie on
    small: bool = False  # so slow (interpreted, say) that only small problems are worth the while
    # By law: cases in which bits were compared that nobody promised, and in how many they differed.
    compared: dict[str, list[int]] = field(default_factory=dict)
    # Its result for the first call of all, of `simplest` with FIRST_CALL keys, or what it failed with.
    first: AttentionOutput | Exception | None = None
    # Findings that are no faults.
    said: list[str] = field(default_factory=list)
    # Fields of the problems that are drawn next which are not left to chance (`draws.edges`).
    pinned: Mapping[str, Any] = field(default_factory=dict)

    def bits(self, law: str, *, differ: bool) -> None:
        """Count a case in which bits were compared that the kernel does not promise."""
        seen = self.compared.setdefault(law, [0, 0])
        seen[0] += 1
        seen[1] += differ

    @property
    def simplest(self) -> Problem:
        """The smallest problem that it takes."""
        has = self.capabilities
        size = head_sizes(has)[0]
        return Problem(
            ratio=1 if has.ratios is None else has.ratios[0],
            k_size=size,
            v_size=size,
            dtype=next(name for name, kind in FLOAT_TYPES.items() if kind.torch_name in has.dtypes),
            path="decode" if "decode" in has.paths else "prefill",
        )

    @property
    def reads_as_given(self) -> bool:
        """Whether keys and values stay what was given, and not what a quantised cache makes of them."""
        call = self.simplest.call(self.device)
        return self.kernel.held(call) is call

    def with_plans(self, changed: Callable[[Plan], Plan]) -> Subject:
        """The same, with what `changed` makes of its plans."""
        plan = self.plan
        assert plan is not None
        return replace(self, plan=lambda options: changed(plan(options)))

    def close(self) -> None:
        self.kernel.close()


def subject_of(
    kernel_or_spec: str | Kernel | Callable[..., Any],
    device: torch.device | str = "cpu",
    *,
    strict: bool = True,
    identify: bool = False,
) -> Subject:
    """The subject of a specification, or of a callable, which is called in this process. Raises SpecError.

    strict: a user's kernel is asked for rows that see no key, whatever it makes of them; else it is where it
    is right for them. identify: a kernel that states nothing is read, and its budgets follow from that.

    >>> import verify
    >>> subject = verify.laws.subject_of("exact")
    >>> verify.laws.LAWS["values-scaled"].check(subject, verify.laws.Problem(n_kv=(17,))) <= 1
    True
    """
    if isinstance(kernel_or_spec, str):
        kernel = build_kernel(kernel_or_spec)
    elif isinstance(kernel_or_spec, Kernel):
        kernel = kernel_or_spec
    else:
        kernel = FunctionKernel(kernel_or_spec)
    spec = kernel.spec
    built: dict[str, Kernel] = {}

    def variant(options: Options) -> Kernel:
        if not isinstance(kernel_or_spec, str):
            return kernel
        text = with_options(spec, options)
        if text not in built:
            built[text] = build_kernel(text)
        return built[text]

    capabilities = kernel.capabilities()
    size, ratio = head_sizes(capabilities)[0], (capabilities.ratios or (1,))[0]
    heads = Heads.grouped(kv=1, ratio=ratio, k_size=size, v_size=size)
    if identify and states_nothing(kernel, "decode", heads):
        learn_as_asked(kernel, str(device))
    plan = _plan_of(spec) if capabilities.plans else None
    subject = Subject(
        spec=spec,
        kernel=kernel,
        variant=variant,
        capabilities=capabilities,
        merge=kernel.merger(),
        plan=plan,
        device=torch.device(device),
    )
    # Whether a user's function returns an lse shows when it runs, and a workspace that nobody filled shows in
    # its very first call.
    try:
        subject.first = kernel.run(replace(subject.simplest, n_kv=FIRST_CALL).call(subject.device))
    except Exception as error:
        subject.first = error
    subject.capabilities = kernel.capabilities()
    if not strict and not subject.capabilities.zero_for_empty_rows:
        with suppress(Exception):
            sentence = empty_merge_finding(kernel, device=device) or empty_row_finding(kernel, device=device)
            if sentence is not None:
                subject.capabilities = replace(subject.capabilities, empty_rows=False)
                subject.said.append(sentence)
    return subject


def _plan_of(spec: str) -> Callable[[Options], Plan]:
    def plan(options: Options) -> Plan:
        named = parse_spec(with_options(spec, {}))
        own = {key: value for key, value in named.options.items() if key in PLAN_OPTIONS}
        return parse_plan(named._replace(options=replaced(own, options)))

    return plan


Unless = Callable[[Subject], str | None]
Cases = Callable[[Subject], SearchStrategy[Any]]


def _always(subject: Subject) -> None:
    return None


def no_merge(subject: Subject) -> str | None:
    return "its merge cannot be called by itself" if subject.merge is None else None


def no_plans(subject: Subject) -> str | None:
    missing = subject.capabilities.lacks("plans")
    return missing or ("takes no plan" if subject.plan is None else None)


def has_one_path(subject: Subject) -> str | None:
    paths = subject.capabilities.paths
    return f"has only the {paths[0]} path" if len(paths) < 2 else None


def no_several(subject: Subject) -> str | None:
    return None if "several" in subject.capabilities.paths else "has no path several"


def no_form(subject: Subject) -> str | None:
    """Of the law of any form of a call."""
    has = subject.capabilities
    none = "several" not in has.paths and not any(getattr(has, form) for form in FORMS)
    return "takes no form of a call" if none else None


def reads_no_cache(subject: Subject) -> str | None:
    if not subject.capabilities.caches:
        return "reads no quantised cache"
    return None if subject.reads_as_given else "has a quantised cache already"


def quantises_keys(subject: Subject) -> str | None:
    """Of laws that write exact numbers into a column of k."""
    if subject.reads_as_given:
        return None
    return "quantises keys: numbers that are written into one column change the others"


@dataclass(frozen=True)
class Law:
    """A named law. It is asked of a subject that has what it needs."""

    name: str  # unique
    group: Group  # that it is listed in
    # One sentence.
    statement: str
    # Where the allowance comes from.
    tolerance: str
    # What a kernel must have for it, and why else it cannot be asked.
    needs: tuple[Promise, ...]
    unless: Unless  # why it cannot be asked of a subject, or None
    # Draws cases for a subject; the law itself, which returns its margin; what it takes beside the subject.
    cases: Cases
    check: Callable[[Subject, Any], float]  # returns its margin, in units of the tolerance
    case_type: type[Case]  # what it takes beside the subject

    def not_applicable(self, subject: Subject) -> str | None:
        """Why this subject cannot be asked, or None if it can."""
        return self.unless(subject) or subject.capabilities.lacks(*self.needs)


LAWS: dict[str, Law] = {}
Check = Callable[[Subject, Any], float]


class Declare(Protocol):
    """What `laws` returns."""

    def __call__(
        self,
        name: str,
        cases: Cases,
        *,
        tolerance: str = ...,
        needs: tuple[Promise, ...] = ...,
        unless: Unless = ...,
        says: str = ...,
    ) -> Callable[[Check], Law]: ...


def laws(group: Group, tolerance: str, *, unless: Unless = _always) -> Declare:
    """A decorator for the laws of a group, with the tolerance of most of them.

    It makes a law of a function and puts it into `LAWS`. says: the statement, by default the docstring. The
    type of the second argument is that of its cases.
    """

    def declare(
        name: str,
        cases: Cases,
        *,
        tolerance: str = tolerance,
        needs: tuple[Promise, ...] = (),
        unless: Unless = unless,
        says: str = "",
    ) -> Callable[[Check], Law]:
        def make(check: Check) -> Law:
            _, case_type, *_ = get_type_hints(check).values()
            made = Law(
                name=name,
                group=group,
                statement=says or " ".join((check.__doc__ or "").split()),
                tolerance=tolerance,
                needs=needs,
                unless=unless,
                cases=cases,
                check=check,
                case_type=case_type,
            )
            assert name not in LAWS and made.statement, name
            LAWS[name] = made
            return made

        return make

    return declare
