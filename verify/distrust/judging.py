"""`verify judge`: a kernel nobody trusts. First whether it is right, then whether it only looks so.

Right: the families and probes of `verify diff`, and the laws of attention, asked of the kernel in a process
of its own and judged in this one. Then the checks of `verify.kernels.foreign.cheats`, in another process.
Only a kernel that passes all of that is timed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from verify.check import DEFAULT_N_KV, Report, check_attention
from verify.distrust.bench_definitions import is_of_bench, to_judge
from verify.given import ONE_HEAD_EACH
from verify.kernels.errors import KernelFailure
from verify.kernels.foreign.cheats import CHEATS
from verify.kernels.foreign.process import WorkerProcess
from verify.kernels.foreign.python_kernel import FORM_OPTIONS, PythonKernel, literal, parse_target
from verify.kernels.heads import Heads
from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.plans.shapes import shape_named
from verify.kernels.plans.spec import parse_spec
from verify.laws import LAWS, subject_of
from verify.laws.run import LawResult, run_law
from verify.machine.devices import chosen_device, default_device
from verify.machine.errors import UsageError

# Names under which a file's kernel is looked for, where none is given.
NAMES = ("ModelNew", "attend", "attention", "kernel", "custom_kernel", "forward", "solution", "run")
# The class that a benchmark's file holds its own kernel against.
REFERENCE = "Model"
Outcome = Literal["passed", "degraded", "broken", "cheats"]
State = Literal["clear", "caught", "not run"]
# A process that a check hangs is ended after so many seconds.
CHECK_LIMIT_S = 60
EXAMPLES = 10
# What a check says whose process did not outlive it.
ENDED = "it ended its process, or hung: "
DEFAULT_HEADS = Heads(4, 2, 64, 64)
_LAWS = (
    "within-budget", "heads-permuted", "keys-permuted", "values-scaled", "logits-shifted", "masked-keys",
    "both-paths", "two-runs",
)  # fmt: skip


@dataclass(frozen=True)
class CheckResult:
    """One check of a cheat. said: what it caught, or why it did not run."""

    name: str
    what: str
    state: State
    said: str = ""


@dataclass(frozen=True)
class Judged:
    """What is known of a kernel after `judge`."""

    spec: str  # of the kernel
    outcome: Outcome  # degraded: it rounds more than the margin; broken: it is wrong; cheats: it looks right
    reasons: list[str]  # each a sentence
    notes: list[str]  # what a reader must know besides
    report: Report  # families, probes and a baseline
    laws: list[LawResult]  # of those that were asked
    checks: list[CheckResult] = field(default_factory=list)  # in the order in which they ran
    seconds: float | None = None  # of a call, the median; None where it was not timed

    @property
    def exit_code(self) -> int:
        return 0 if self.outcome == "passed" else 1


def judge(
    target: str,
    *,
    dtype: str = "",
    shape: str | None = None,
    n_kv: Sequence[int] = DEFAULT_N_KV,
    arithmetic: str | None = None,
    device: str | None = None,
    examples: int = EXAMPLES,
    definition: str | None = None,
    on_step: Callable[[str], None] = lambda name: None,
) -> Judged:
    """Judge FILE.py[::NAME][,option=value,...], or a solution or the reference of a definition of
    flashinfer-bench (JSON); definition: what a solution or FILE.py is of. Raises UsageError, SpecError."""
    if definition is not None or is_of_bench(target):
        for name, given in (("--shape", shape), ("--dtype", dtype)):
            if given:
                raise UsageError(f"{name} {given}: a definition says it")
        with to_judge(target, definition) as one:
            judged = judge(
                one.spec,
                dtype=one.dtype,
                shape=one.shape,
                n_kv=n_kv,
                arithmetic=arithmetic,
                device=device,
                examples=examples,
                on_step=on_step,
            )
        return replace(judged, spec=target)
    on = str(chosen_device(device or default_device()))
    spec, reference = kernel_of_file(target)
    parsed = parse_spec(spec)
    if dtype and dtype not in FLOAT_TYPES:
        raise UsageError(f"--dtype {dtype}: expected one of {', '.join(FLOAT_TYPES)}")
    dtype = dtype or parsed.options.get("dtype", "")
    if reference is not None:
        dtype = dtype or input_type(Path(parse_target(parsed).where))
        spec, shape = in_the_form_of(spec, reference, shape)
    on_step("families and probes")
    report = check_attention(spec, shapes=shape, n_kv=n_kv, dtype=dtype or None, arithmetic=None, device=on)
    on_step("laws")
    laws = _laws(spec, on, examples)
    reasons = [f"{r.law.name}: {r.reason}" for r in laws if r.state == "broken"]
    compared = any(cell.compared for found in report.outcomes.values() for cell in found.candidates[0].cells)
    if not compared:
        reasons = [*report.reasons[:1], "nothing of it could be compared", *reasons]
    outcome: Outcome = "passed"
    if reasons or report.verdict == "broken":
        outcome = "broken"
    elif report.verdict == "degraded":
        outcome = "degraded"
    if compared and report.verdict in ("broken", "degraded"):
        reasons = [*report.reasons[:2], *reasons]
    # Whoever is caught cheating is said to, wrong or not: it is why.
    heads = shape_named(shape).heads if shape else DEFAULT_HEADS
    checks, seconds = _checks(
        spec, reference, dtype or "f16", on, arithmetic, on_step, is_right=not reasons, heads=heads
    )
    caught = [c for c in checks if c.state == "caught"]
    if caught:
        outcome, reasons = "cheats", [f"{c.name}: {c.said}" for c in caught] + reasons
    return Judged(
        spec=spec,
        outcome=outcome,
        reasons=reasons or ["right on every input that was drawn, no law broken, no cheat caught"],
        notes=report.notes,
        report=report,
        laws=laws,
        checks=checks,
        seconds=None if caught else seconds,
    )


def kernel_of_file(target: str) -> tuple[str, str | None]:
    """The specification of a file's kernel, and the name of the class that it stands beside, if it does.

    Raises UsageError.
    """
    text = target if target.startswith("py:") else f"py:{target}"
    first, _, options = text.partition(",")
    file = Path(first[3:].partition("::")[0])
    if not file.is_file():
        found = "found a folder" if file.is_dir() else "no such file"
        raise UsageError(f"{file}: expected a file of Python, {found}")
    defined = names_defined(file)
    if not defined:
        raise UsageError(f"{file}: expected a kernel, found no function and no class")
    if "::" not in first:
        name = next((name for name in NAMES if name in defined), None)
        if name is None:
            raise UsageError(
                f"{file}: which of {', '.join(sorted(defined)) or 'nothing'} is the kernel? {file}::NAME"
                " says it"
            )
        first = f"{first}::{name}"
    beside = REFERENCE if REFERENCE in defined and first.endswith("::ModelNew") else None
    return ",".join(filter(None, (first, options))), beside


def in_the_form_of(spec: str, reference: str, shape: str | None) -> tuple[str, str | None]:
    """The specification with the form of the class that it stands beside, which is taken to be right; and a
    shape that it takes.

    Raises UsageError where that is no attention.
    """
    where = parse_target(parse_spec(spec)).where
    theirs = PythonKernel.from_spec(parse_spec(f"py:{where}::{reference}"))
    greeting = theirs.greeting
    theirs.close()
    if greeting["never_right"]:
        raise UsageError(
            f"{where}: {reference} is not attention of three tensors q, k, v in any form that is known:"
            " nothing to judge it by"
        )
    options = parse_spec(spec).options
    found = {"layout": greeting["layout"]}
    if (way := greeting["way"]) in ("none", "causal", "square"):
        found["mask"] = "none" if way == "none" else "causal"
    given = {name: x for name, x in found.items() if name not in options}
    if greeting["one_head_each"]:
        shape = shape or ONE_HEAD_EACH[0]
    return ",".join([spec, *(f"{name}={x}" for name, x in given.items())]), shape


def names_defined(file: Path) -> set[str]:
    """Functions and classes at the top of a file, read and not run. Raises UsageError."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{file}: is no Python: {error}") from None
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = {node.name for node in tree.body if isinstance(node, kinds)}
    assigned = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    return {name for name in found | {t.id for t in assigned if isinstance(t, ast.Name)} if name[0] != "_"}


def input_type(file: Path) -> str:
    """The type that a benchmark's get_inputs makes, where its text says one: float32 is torch's own."""
    text = file.read_text(encoding="utf-8")
    for name, kind in FLOAT_TYPES.items():
        if f"torch.{kind.torch_name}" in text:
            return name
    return "f16" if ".half()" in text.partition("def get_inputs")[2] else "f32"


def _laws(spec: str, device: str, examples: int) -> list[LawResult]:
    subject = subject_of(spec, device, strict=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chosen = [law for name, law in LAWS.items() if name in _LAWS]
        return [run_law(law, subject, examples=examples, seed=0) for law in chosen]
    finally:
        torch.set_num_threads(threads)
        subject.close()


def _checks(
    spec: str,
    reference: str | None,
    dtype: str,
    device: str,
    arithmetic: str | None,
    on_step: Callable[[str], None],
    *,
    is_right: bool,
    heads: Heads = DEFAULT_HEADS,
) -> tuple[list[CheckResult], float | None]:
    """Every check, and the median seconds of a call. A check that ends its process is caught by that."""
    parsed = parse_spec(spec)
    target = parse_target(parsed)
    wanted: dict[str, Any] = {name: parsed.options.get(name, "") for name in FORM_OPTIONS}
    wanted["options"] = {
        name: literal(x)
        for name, x in parsed.options.items()
        if name not in (*FORM_OPTIONS, "acc", "timeout", "deterministic")
    }
    arguments = {
        **target._asdict(),
        "where": str(Path(target.where).resolve()),
        "name": target.name,
        "wanted": wanted,
        "reference": reference,
        "device": device,
        "dtype": FLOAT_TYPES[dtype].torch_name,
        # Sequences, rows, keys, query heads, KV heads, head size.
        "sizes": [2, 3, 65, heads.q, heads.kv, heads.k_size],
    }
    worker = WorkerProcess(spec, target.name, "cheat_servant.py", arguments)
    results: list[CheckResult] = []
    seconds, ended = None, False
    try:
        for name, cheat in CHEATS.items():
            on_step(name)
            if name == "downcast" and arithmetic is not None:
                said = f"--arithmetic {arithmetic}: narrower numbers are stated"
                results.append(CheckResult(name, cheat.what, "not run", said))
                continue
            if name == "downcast" and not is_right:
                said = "its results are wrong: how coarse they are says nothing"
                results.append(CheckResult(name, cheat.what, "not run", said))
                continue
            if ended:
                results.append(CheckResult(name, cheat.what, "not run", "its process had ended before"))
                continue
            results.append(_asked(worker, name, cheat.what))
            ended = results[-1].said.startswith(ENDED)
        if is_right and not any(r.state == "caught" for r in results):
            on_step("timing")
            worker.ask({"check": "timing"}, {}, {}, CHECK_LIMIT_S)
            took = worker.said.get("seconds") or []
            seconds = median(took) if took else None
    except KernelFailure as failure:
        results.append(CheckResult("timing", "calls on fresh inputs, timed", "caught", str(failure)))
    finally:
        worker.close()
    return results, seconds


def _asked(worker: WorkerProcess, name: str, what: str) -> CheckResult:
    try:
        worker.ask({"check": name}, {}, {}, CHECK_LIMIT_S)
    except KernelFailure as failure:
        if failure.kind not in ("hung", "died"):
            return CheckResult(name, what, "not run", f"the kernel {failure.kind}: {failure}")
        return CheckResult(name, what, "caught", f"{ENDED}{failure}")
    if reason := worker.said.get("not_run"):
        return CheckResult(name, what, "not run", reason)
    said = worker.said.get("caught")
    return CheckResult(name, what, "clear") if said is None else CheckResult(name, what, "caught", said)
