"""`verify.check_attention`: a callable against exact attention and a baseline, in this process.

What `verify diff` does with a specification, for whoever has the function at hand: the same inputs, budgets,
strata and verdicts (`verify.diff`), with the worst case's tensors to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from verify.call_options import Layout
from verify.diff.cells import Cell
from verify.diff.examining import CellInputs
from verify.diff.inputs import DiffSettings, all_inputs, check_settings
from verify.diff.naming import looks_like
from verify.diff.probing import PROBES, Probing
from verify.diff.results import DiffOutcome, summary_lines
from verify.diff.run import run_diff
from verify.diff.shrinking import Shrinker
from verify.diff.stored_baseline import BaselineStore, StoredBaseline
from verify.given import dtype_of, kernel_of, lengths_of, name_of, paths_of, shapes_of
from verify.judge.verdict import DEFAULT_MARGIN, EXIT_CODES, Decision, Verdict, overall
from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import AttentionPath, Call
from verify.kernels.capabilities import FORMS as FORMS_OF_KERNELS
from verify.kernels.foreign.forms import Wanted
from verify.kernels.foreign.function_kernel import FunctionKernel
from verify.kernels.judging.families import ALL_FAMILIES, CALLS, FAMILIES, FORMS
from verify.kernels.judging.families import draw as draw_call
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.judging.probes import probe_makers
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import type_of
from verify.kernels.plans.shapes import shape_named
from verify.kernels.registry import build_kernel
from verify.kernels.torch_settings import MEASURING
from verify.machine.devices import chosen_device, default_device
from verify.machine.files import write_whole
from verify.machine.jsontext import to_json_text
from verify.machine.stages import StageClock
from verify.reports.diff_pictures import diff_pictures
from verify.reports.templating import TEMPLATES, figure
from verify.stated import stated_arithmetic

# A length inside a tile, one beside its edge, and some tiles.
DEFAULT_N_KV, DEFAULT_ROWS = (33, 65, 300), 32
# Beside these, for faults alone: past every length at which kernels are known to become another one.
LONG_N_KV = 4099
# The arithmetic of `flash` with nothing to compile: that was most of the first check of a process on a GPU.
DEFAULT_BASELINE = "eager"
# Logits of a call up to which errors are worked out on the CPU: some 700,000 small steps, each of which takes
# longer to launch on a GPU than to do.
MOST_LOGITS_ON_CPU = 1 << 20
SCHEMA = 1


class AttentionMismatch(AssertionError):
    """Attention that is not what it should be. report: the `Report` that says so, None of tensors at hand."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class WorstCase:
    """The inputs on which a kernel did worst, and where: `call` holds q, k, v, kv_len and options."""

    shape: str  # query heads / KV heads x head size
    n_kv: int  # keys of the longest row
    family: str  # kind of inputs: a family, or a probe's name
    seed: int  # of the draw
    path: AttentionPath  # decode, several or prefill
    # Sequence, row, head and element of the largest error beside its budget; empty where there is none.
    place: tuple[int, ...]
    got: float  # what the kernel gave there
    exact: float  # and what is due
    # |error| over its budget there; NaN where no budget says anything.
    ratio: float
    # What is wrong, in words; empty where nothing is.
    said: str
    # q, k, v, kv_len, scale and options, as the kernel was given them.
    call: Call
    n_q: int = 0  # query tokens a call that were asked for; 0: none were
    sequences: int = 1  # likewise

    @property
    def q(self) -> torch.Tensor:
        """[B, T, Hq, Dk]."""
        return self.call.q

    @property
    def k(self) -> torch.Tensor:
        """[B, S, Hkv, Dk]."""
        return self.call.k

    @property
    def v(self) -> torch.Tensor:
        """[B, S, Hkv, Dv]."""
        return self.call.v

    @property
    def snippet(self) -> str:
        """Python that makes these inputs again."""
        if self.family in ALL_FAMILIES:
            more = f", n_q={self.n_q}" if self.n_q else ""
            more += f", sequences={self.sequences}" if self.sequences != 1 else ""
            if self.family in FAMILIES and not self.n_q:
                more += f", rows={self.call.shape.rows}"
            made = (
                f"call = families.draw({self.family!r}, {self.shape!r}, n_kv={self.n_kv}, seed={self.seed},"
                f" path={self.path!r}, dtype={_dtype_name(self.call)!r}{more})"
            )
        else:
            made = (
                f"call = families.probe({self.family!r}, {self.shape!r}, n_kv={self.n_kv},"
                f" path={self.path!r}, dtype={_dtype_name(self.call)!r})"
            )
        return f"from verify import families\n\n{made}\n# call.q, call.k, call.v, call.kv_len, call.scale"


def _dtype_name(call: Call) -> str:
    kind = type_of(call.q.dtype)
    return kind.name if kind is not None else "f32"


@dataclass(frozen=True)
class Report:
    """What `check_attention` found. `verdict` is one of identical, improved, round-off, degraded, broken,
    inconclusive; shown as a table with a picture in a notebook."""

    name: str  # what was checked
    baseline: str  # what it was compared with
    verdict: Verdict  # over all paths, shapes and lengths
    reasons: list[str]  # why, each a sentence
    notes: list[str]  # what a reader must know besides
    # A row a path, shape and length: the largest err/budget, rms, gain, NMSE, ratio to the baseline.
    table: list[dict[str, Any]]
    # The inputs on which it did worst; None where nothing was compared.
    worst: WorstCase | None
    # The smallest of that kind on which it still fails; None where nothing failed, or none is smaller.
    smallest: WorstCase | None
    # Of a broken kernel: known bugs that it looks like, the likest first, each a sentence.
    looks_like: list[str]
    # What it would have seen: a ratio of errors from here on is `degraded` in any kind of input.
    detectable: float | None
    # As `verify diff` has them, a path each.
    outcomes: dict[str, DiffOutcome] = field(repr=False)

    @property
    def exit_code(self) -> int:
        """Of the verdict, as a command's: 0, 1, or 3 for inconclusive."""
        return EXIT_CODES[self.verdict]

    @property
    def ok(self) -> bool:
        """Whether the verdict is identical, improved or round-off."""
        return self.exit_code == 0

    def raise_for_verdict(self) -> None:
        """Raises AttentionMismatch unless the verdict is one of identical, improved, round-off."""
        if not self.ok:
            raise AttentionMismatch(self.text(), self)

    def text(self) -> str:
        """The verdict, why, and where, as lines."""
        lines = [f"{self.name}: {self.verdict}: {'; '.join(self.reasons)}"]
        if self.worst is not None and self.verdict != "inconclusive":
            w = self.worst
            lines.append(
                f"worst inputs: {w.family}, {w.shape} at {w.n_kv} keys, path {w.path}, seed {w.seed}"
            )
            if w.said:
                lines.append(f"  {w.said}")
            if (s := self.smallest) is not None:
                lines.append(f"fewest keys and heads that still fail: {s.shape} at {s.n_kv} keys")
                lines.append(f"  {s.said}")
                w = s
            lines += ["again:", *(f"  {line}" for line in w.snippet.splitlines())]
        lines += self.looks_like[:1]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()

    def to_json(self) -> str:
        """The report as JSON text; its schema is `verify/schemas/check.json`."""
        return to_json_text(
            {
                "schema": SCHEMA,
                "command": "check",
                "name": self.name,
                "baseline": self.baseline,
                "verdict": self.verdict,
                "exit_code": self.exit_code,
                "reasons": self.reasons,
                "notes": self.notes,
                "table": self.table,
                "worst": _case_json(self.worst),
                "smallest": _case_json(self.smallest),
                "looks_like": self.looks_like,
                "detectable": self.detectable,
                "runs": {path: outcome.run for path, outcome in self.outcomes.items()},
            }
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the verdict, why, a table, and a picture of the errors."""
        pictures = [
            picture
            for path, outcome in self.outcomes.items()
            for picture in diff_pictures(outcome.run["cells"], prefix=f"{path}-")
        ]
        return TEMPLATES.get_template("check.html.j2").render(report=self, pictures=pictures, figure=figure)


def _case_json(w: WorstCase | None) -> dict[str, Any] | None:
    if w is None:
        return None
    return {
        "shape": w.shape, "n_kv": w.n_kv, "family": w.family, "seed": w.seed, "path": w.path,
        "place": list(w.place), "got": w.got, "exact": w.exact, "budget_ratio": w.ratio,
        "said": w.said, "snippet": w.snippet,
    }  # fmt: skip


def check_attention(
    fn: Callable[..., Any] | str,
    *,
    shapes: Sequence[str] | str | None = None,
    n_kv: Sequence[int] | int = DEFAULT_N_KV,
    dtype: str | torch.dtype | None = None,
    layout: Layout | None = None,
    causal: bool | None = None,
    paths: Sequence[AttentionPath] | AttentionPath | None = None,
    baseline: Callable[..., Any] | str | None = None,
    arithmetic: str | Arithmetic | None = None,
    options: Mapping[str, Any] | None = None,
    families: Sequence[str] | None = None,
    seeds: int = 1,
    first_seed: int = 0,
    rows: int = DEFAULT_ROWS,
    margin: float = DEFAULT_MARGIN,
    device: str | torch.device | None = None,
    isolate: bool = False,
    n_q: int = 0,
    sequences: int = 1,
    store: str | Path | None = None,
    against_stored: str | Path | None = None,
) -> Report:
    """Hold a callable's results against exact attention, its rounding budget, and a baseline.

    fn: (q, k, v, *, kv_len, scale) -> out or (out, lse); a function, lambda, bound method, nn.Module,
        operator, compiled function or wrapper, or a specification of `verify list`. Without kv_len it is
        asked how it sees keys; what its form lacks is in `Report.notes`.
    shapes: "Hq/HkvxD" (query heads, KV heads, head size) or names such as "llama-3-8b"; default "4/2x64",
        or "4/4x64" of a kernel whose heads share no keys.
    n_kv: keys that a row sees, one or several lengths; with the default ones a few rows of 4,099 keys are
        looked at for faults.
    dtype: of q, k, v: "f16" (default), "bf16", "f32", or torch's.
    layout: order of its dimensions, "bshd" [B, T, H, D] (default), "bhsd" [B, H, T, D], "thd" [tokens, H, D].
    causal: what a callable without kv_len sees: True a triangle, False every key; None: it is asked.
    paths: "decode" (rows as if each were alone), "several" (up to 16 tokens a call, as speculation has them),
        "prefill" (rows one after another); default decode and prefill, of what it has.
    n_q: query tokens a call on the paths several (default 4) and prefill (default `rows`). sequences: in a
        call, every second one shorter.
    baseline: what errors are compared with, a callable or specification; default `eager`, which answers in
        the type that fn returns.
    arithmetic: what fn is known to do: "f32" or "f16" sums, an `Arithmetic`, or options as specifications
        write them ("p=f16,acc=f32"); None or "identify": nothing is stated, and it is read off fn as
        `verify identify` does; where it cannot be, budgets are as loose as any.
    options: keywords that fn is given with every call.
    families: kinds of inputs, names of `verify.families.names()` and "probes"; default all, of the forms
        (pages, packed tokens, masks, lists of keys) those that fn takes.
    seeds, first_seed: draws of every family, and the first. rows: query tokens a draw, at least 2.
    margin: an error so many times the baseline's is `round-off`; significantly beyond it `degraded`.
    device: where fn runs, "cpu" or "cuda"; default cuda where there is one.
    isolate: run fn in a process of its own: a crash or a hang is then a finding. fn must be importable.
    store: write what the baseline did to this file; against_stored: such a file, in the place of running the
        baseline again, refused where settings, rules or inputs are others (docs/library.md).

    Raises UsageError or SpecError on bad input; what fn raises is a finding in the report.

    >>> import torch
    >>> def attend(q, k, v, *, kv_len, scale):
    ...     k, v = (x.float().repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    ...     s = torch.einsum("bthd,bshd->bths", q.float(), k) * scale
    ...     hidden = torch.arange(k.shape[1]) >= kv_len[:, :, None, None]
    ...     return torch.einsum("bths,bshd->bthd", s.masked_fill(hidden, -torch.inf).softmax(-1), v)
    >>> report = check_attention(attend, n_kv=65, paths="decode", families=["gaussian", "needles"])
    >>> report.verdict in ("round-off", "improved")
    True
    >>> wrong = check_attention(lambda q, k, v, *, kv_len, scale: attend(
    ...     q, k, v, kv_len=(kv_len - 1).clamp(min=1), scale=scale), n_kv=65, paths="decode")
    >>> wrong.verdict, wrong.ok
    ('broken', False)
    """
    on = chosen_device(str(device) if device is not None else default_device())
    # A diff reads what states nothing.
    stated = None if arithmetic == "identify" else stated_arithmetic(arithmetic)
    mask = "" if causal is None else "causal" if causal else "none"
    wanted = Wanted(layout=layout or "", mask=mask, options=dict(options or {}))
    kernel = kernel_of(fn, wanted, stated, isolate=isolate)
    reference = kernel_of(baseline, Wanted(), None) if callable(baseline) else None
    of_shapes, lengths = shapes_of(shapes, kernel), lengths_of(n_kv)
    logits = max((shape_named(s).heads.q for s in of_shapes), default=0) * max(lengths) * rows * sequences
    judged_on, measuring = on, MEASURING
    if logits <= MOST_LOGITS_ON_CPU:
        judged_on = _judged_on(on, kernel, baseline if reference is None else reference)
        # Threads cost steps this small more than they save; the callable has those of its caller.
        measuring = MEASURING._replace(threads=1)
    with measuring.applied():
        settings = partial(
            DiffSettings,
            shapes=of_shapes,
            n_kvs=lengths,
            long_n_kvs=(LONG_N_KV,) if lengths == DEFAULT_N_KV else (),
            candidates=(kernel.spec,),
            device=str(on),
            seeds=seeds,
            first_seed=first_seed,
            margin=margin,
            rows=rows,
            dtype=dtype_of(dtype, kernel),
            allow_same=kernel.spec == baseline,
            sequences=sequences,
        )
        built = {each.spec: each for each in (kernel, reference) if each is not None}

        def kept(spec: str) -> Kernel:
            if spec not in built:
                built[spec] = build_kernel(spec)
            return built[spec]

        stored = StoredBaseline(Path(against_stored)) if against_stored is not None else None
        kept_of_baseline = BaselineStore() if store is not None else None
        outcomes: dict[str, DiffOutcome] = {}
        smallest: dict[str, WorstCase | None] = {}
        probings: dict[_Place, Probing] = {}
        try:
            for path in paths_of(paths, kernel):
                own = settings(
                    path=path,
                    families=_families(families, kernel, path),
                    baseline=reference.spec if reference is not None else str(baseline or DEFAULT_BASELINE),
                    n_q=0 if path == "decode" else n_q,
                )
                check_settings(own, [] if own.baseline in built else [own.baseline])
                inputs = _remembered(all_inputs(own, judged_on, clock := StageClock(judged_on)), probings)
                outcomes[path] = run_diff(
                    own, judged_on, inputs, clock,
                    build=kept, store=kept_of_baseline, stored=stored, name_bugs=False,
                )  # fmt: skip
                found = outcomes[path].candidates[0]
                if not smallest and found.verdict == "broken" and found.worst is not None:
                    # Now, while what was read off it is of this path.
                    there = replace(own, device=str(judged_on))
                    smallest[path] = _smallest(kernel, _worst(own, found.worst, probings), there)
            if kept_of_baseline is not None and store is not None:
                write_whole(Path(store), kept_of_baseline.packed(str(judged_on)))
            report = _report(name_of(fn), outcomes, probings)
            if report.verdict == "broken" and report.worst is not None:
                alike = [str(x) for x in looks_like(kernel, judged_on)]
                report = replace(report, smallest=smallest.get(report.worst.path), looks_like=alike)
        finally:
            for each in built.values():
                each.close()
    # As the kernel was given them.
    worst, least = (x and replace(x, call=x.call.on(on)) for x in (report.worst, report.smallest))
    return replace(report, worst=worst, smallest=least)


def _judged_on(on: torch.device, *kernels: Kernel | Callable[..., Any] | str | None) -> torch.device:
    """Where small calls are drawn and judged: on the CPU, from where callables of this process are called on
    `on`. With kernels that run where a call lies, there. None: the default baseline, which runs anywhere."""
    called = [each for each in kernels if isinstance(each, FunctionKernel)]
    if len(called) < sum(each is not None for each in kernels):
        return on
    for each in called:
        each.runs_on = on
    return torch.device("cpu")


def _smallest(kernel: Kernel, worst: WorstCase, settings: DiffSettings) -> WorstCase | None:
    """The same kind of inputs with fewer keys and heads, where it still fails."""
    shrinker = Shrinker(kernel, settings, worst.family, worst.seed)
    found = shrinker.smallest(worst.shape, worst.n_kv)
    if found is None or (found.shape, found.n_kv) == (worst.shape, worst.n_kv):
        return None
    return WorstCase(
        shape=found.shape,
        n_kv=found.n_kv,
        family=found.family,
        seed=worst.seed,
        path=worst.path,
        place=tuple(found.evidence.worst),
        got=found.evidence.worst_values[0],
        exact=found.evidence.worst_values[1],
        ratio=found.evidence.figure("budget"),
        said=found.said,
        call=found.call,
        n_q=worst.n_q,
        sequences=worst.sequences,
    )


def _families(names: Sequence[str] | None, kernel: Kernel, path: AttentionPath) -> tuple[str, ...]:
    if names is not None:
        return (names,) if isinstance(names, str) else tuple(names)
    calls = [name for name, call in CALLS.items() if path in call.paths]
    has = kernel.capabilities()
    formed = FORMS if any(getattr(has, form) for form in FORMS_OF_KERNELS) else {}
    # One small call of each form says whether the kernel has it.
    forms = [name for name in formed if has.refuses_form(draw_call(name, InputSizes(n_kv=(3,)), 0)) is None]
    return (PROBES, *FAMILIES, *calls, *forms)


_Place = tuple[AttentionPath, str, int]


def _remembered(
    inputs: Iterable[CellInputs | Probing], probings: dict[_Place, Probing]
) -> Iterator[CellInputs | Probing]:
    """The same, with what was probed kept: a probe that fails is made again."""
    for each in inputs:
        if isinstance(each, Probing):
            probings[each.sizes.path, each.shape, each.n_kv] = each
        yield each


def _report(name: str, outcomes: dict[str, DiffOutcome], probings: dict[_Place, Probing]) -> Report:
    results = {path: outcome.candidates[0] for path, outcome in outcomes.items()}
    verdict = overall([Decision(r.verdict, r.reasons) for r in results.values()])
    several = len(results) > 1
    reasons = [
        f"{path}: {reason}" if several else reason for path, r in results.items() for reason in r.reasons
    ]
    gravest = [(path, r) for path, r in results.items() if r.verdict == verdict]
    worst = None
    for path, result in gravest or list(results.items()):
        cell = result.worst
        if cell is not None and worst is None:
            worst = _worst(outcomes[path].settings, cell, probings)
    least = [x for o in outcomes.values() for x in o.run["detectable"].values() if x is not None]
    return Report(
        name=name,
        baseline=next(iter(results.values())).baseline,
        verdict=verdict,
        reasons=reasons,
        notes=list(dict.fromkeys(note for outcome in outcomes.values() for note in outcome.notes)),
        table=[{"path": path, **line} for path, r in results.items() for line in summary_lines(r)],
        worst=worst,
        smallest=None,
        looks_like=[],
        detectable=max(least, default=None),
        outcomes=outcomes,
    )


def _worst(settings: DiffSettings, cell: Cell, probings: Mapping[_Place, Probing]) -> WorstCase:
    inputs, found = cell.inputs, cell.candidate
    family, call = inputs.family, inputs.call
    on = settings.path
    if family == PROBES and found.probes_failed:
        probing = probings.get((on, inputs.shape, inputs.n_kv))
        for make in (
            probe_makers(probing.sizes, device=call.q.device, brief=probing.brief)
            if probing is not None
            else []
        ):
            probe = make()
            if found.probes_failed[0].startswith(f"probe {probe.name} ("):
                family, call = probe.name, probe.call
                break
    said = cell.faults[0] if cell.faults else ""
    return WorstCase(
        shape=inputs.shape,
        n_kv=inputs.n_kv,
        family=family,
        seed=inputs.seed,
        path=on,
        place=tuple(found.worst),
        got=found.worst_values[0],
        exact=found.worst_values[1],
        ratio=found.figure("budget"),
        said=said.removeprefix("candidate: ").removeprefix("candidate "),
        call=call,
        n_q=settings.n_q,
        sequences=settings.sequences,
    )
