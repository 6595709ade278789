"""What a kernel diff runs over: its settings, and the inputs of every cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from verify.arms.model_facts import check_lengths, check_shapes
from verify.diff.captured import captured_inputs
from verify.diff.examining import CellInputs
from verify.diff.probing import PROBES, Probing
from verify.judge.strata import PLAIN, looks_until
from verify.judge.verdict import DEFAULT_MARGIN, check_margin
from verify.kernels.call import AttentionPath, Call, Shape
from verify.kernels.judging.families import ALL_FAMILIES, CALLS, FAMILIES, HIDDEN, draw
from verify.kernels.judging.hidden_keys import with_hidden
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.plans.asked import MOST_SEVERAL
from verify.kernels.plans.shapes import ModelShape, shape_named
from verify.kernels.plans.spec import parse_spec
from verify.kernels.registry import UNTOLD, build_kernel
from verify.machine.errors import UsageError
from verify.machine.stages import StageClock

# Cut edges that inputs are made for: the first and the last few of a plan.
MOST_EDGES = 6
# Rows of each cell: samples of its stratum. Fixed by `benchmarks/strata.py`.
DEFAULT_ROWS = 64
# How many times its rows a kind of input that cannot decide may come to.
MOST_TIMES = 16
# Of inputs that show faults alone.
FEW_ROWS = 4
# What longer rows are asked: numbers that are plain, and one heavy key beside an edge.
LONG_FAMILIES = ("gaussian", "needles")
# Of plain inputs, on which a baseline's error is typical.
PLAIN_ROWS = 16
# Query tokens a call of the path `several`, where nobody says how many.
SEVERAL = 4


def families_of(text: str, path: AttentionPath, *, hidden: bool = False) -> tuple[str, ...]:
    """`all`, or names, comma between: probes and all kinds of inputs that the path has. hidden: those whose
    hidden keys hold NaN as well."""
    named = [PROBES, *FAMILIES, *(name for name, call in CALLS.items() if path in call.paths)]
    chosen = named if text == "all" else text.split(",")
    return (*chosen, *HIDDEN) if hidden else tuple(chosen)


@dataclass(frozen=True)
class DiffSettings:
    """What a kernel diff runs over, each shape, length and family once."""

    shapes: tuple[str, ...]  # names or sizes of layers
    n_kvs: tuple[int, ...]  # visible keys
    families: tuple[str, ...]  # of inputs
    baseline: str  # specification
    candidates: tuple[str, ...]  # specifications
    device: str  # by torch's name
    path: AttentionPath = "decode"  # of the calls
    seeds: int = 1  # draws of every family
    first_seed: int = 0  # of them
    margin: float = DEFAULT_MARGIN  # distance ratio that still is round-off
    # Folder of a `verify ppl --capture` run, whose inputs stand in the place of these.
    captured_from: str | None = None
    # A user's kernel must be right for a row that sees no key, and bear NaN in keys that no row sees.
    strict: bool = False
    rows: int = DEFAULT_ROWS  # query tokens of a cell
    most_rows: int = 0  # that a kind which cannot decide may come to; 0: MOST_TIMES those of a cell
    allow_same: bool = False  # a candidate may be its baseline's specification
    headroom: bool = False  # how near float16 sums are to overflow is told
    dtype: str = "f16"  # of q, k and v: f16, bf16, f32
    sequences: int = 1  # in a call: every second one is shorter than the cell's length
    # Query tokens a call on the paths prefill and several; 0: all of a cell's rows, of `several` four.
    n_q: int = 0
    # Visible keys of longer rows, that are asked for faults alone: a few, of `LONG_FAMILIES`.
    long_n_kvs: tuple[int, ...] = ()
    # Of the visible keys, those at which one-hot probes ask for each key once (`probe_makers`).
    brief_n_kvs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        known = (PROBES, *ALL_FAMILIES)
        unknown = [f for f in self.families if f not in known]
        if unknown:
            raise UsageError(f"--inputs {unknown[0]}: expected all or any of {', '.join(known)}")
        for family in self.families:
            if family in CALLS and self.path not in CALLS[family].paths:
                raise UsageError(f"--inputs {family}: expected --path {CALLS[family].paths[-1]}")
        if self.dtype not in FLOAT_TYPES:
            raise UsageError(f"--dtype {self.dtype}: expected one of {', '.join(FLOAT_TYPES)}")
        if self.sequences < 1:
            raise UsageError(f"--sequences {self.sequences}: expected at least 1")
        if self.n_q < 0 or (self.n_q and self.path == "decode"):
            raise UsageError(
                f"--n-q {self.n_q}: expected at least 1, and --path prefill or several: on the decode path"
                " every row is computed as if it were alone"
            )
        if self.path == "several":
            if self.n_q > MOST_SEVERAL:
                raise UsageError(f"--n-q {self.n_q}: expected at most {MOST_SEVERAL} on the path several")
            object.__setattr__(self, "n_q", self.n_q or SEVERAL)
        check_margin(self.margin)
        if self.seeds < 1:
            raise UsageError(f"--seeds {self.seeds}: expected at least 1")
        if self.rows < 2:
            raise UsageError(f"--rows {self.rows}: expected at least 2")
        if self.most_rows and self.most_rows < self.rows:
            raise UsageError(f"--most-rows {self.most_rows}: expected at least --rows, {self.rows}")
        # The same inputs twice are no more evidence than once, under whatever name.
        shapes = {shape_named(name)._replace(name=""): name for name in reversed(self.shapes)}
        object.__setattr__(self, "shapes", tuple(reversed(shapes.values())))
        object.__setattr__(self, "n_kvs", tuple(dict.fromkeys(self.n_kvs)))
        object.__setattr__(self, "families", tuple(dict.fromkeys(self.families)))
        object.__setattr__(self, "brief_n_kvs", tuple(dict.fromkeys(self.brief_n_kvs)))
        for n_kv in self.brief_n_kvs:
            if n_kv not in self.n_kvs:
                raise UsageError(f"--brief {n_kv}: expected lengths of --n-kv")

    @property
    def looks(self) -> int:
        """That a kind of input which cannot decide is given, each at twice the rows of the one before."""
        if self.captured_from is not None:
            return 1
        return looks_until(self.rows, self.most_rows or MOST_TIMES * self.rows)


def all_inputs(
    settings: DiffSettings, device: torch.device, clock: StageClock
) -> Iterator[CellInputs | Probing]:
    """The inputs of every cell, one at a time. Raises SpecError, UsageError."""
    if settings.captured_from is not None:
        yield from captured_inputs(settings.captured_from, settings.path, device)
        return
    for name in settings.shapes:
        shape = shape_named(name)
        for n_kv in settings.n_kvs:
            for family in settings.families:
                yield from _of_kind(settings, shape, n_kv, family, device, clock)
        yield from _long_inputs(settings, shape, device, clock)


def _of_kind(
    settings: DiffSettings,
    shape: ModelShape,
    n_kv: int,
    family: str,
    device: torch.device,
    clock: StageClock,
) -> Iterator[CellInputs | Probing]:
    """The inputs of one shape, length and family."""
    everyone = range(len(settings.candidates))
    groups = _by_edges(settings, shape, n_kv) if _edged(family) else {(): everyone}
    for edges, candidates in groups.items():
        if family == PROBES:
            # Of a probe a row or two say all.
            few = _sizes(replace(settings, rows=2), shape, n_kv, edges)
            yield Probing(shape.name, n_kv, few, tuple(candidates), n_kv in settings.brief_n_kvs)
            continue
        few_rows = family not in FAMILIES
        sizes = _sizes(_few_rows(settings) if few_rows else settings, shape, n_kv, edges)
        draws = settings.seeds * (1 if few_rows else _calls_a_cell(settings))
        for seed in range(settings.first_seed, settings.first_seed + draws):
            fields: dict[str, Any] = {
                "shape": shape.name,
                "n_kv": n_kv,
                "family": family,
                "seed": seed,
                "candidates": tuple(candidates),
            }
            kind = ALL_FAMILIES[family]
            if kind.unseen is None and not kind.after:
                yield CellInputs.later(partial(_timed_draw, family, sizes, seed, device, clock), **fields)
                continue
            with clock.stage("inputs drawn", n_kv):
                drawn = _drawn(family, sizes, seed, device, strict=settings.strict)
            yield CellInputs(**fields, **drawn)


def _timed_draw(family: str, sizes: InputSizes, seed: int, device: torch.device, clock: StageClock) -> Call:
    with clock.stage("inputs drawn", max(sizes.n_kv)):
        return draw(family, sizes, seed, device=device)


def _long_inputs(
    settings: DiffSettings, shape: ModelShape, device: torch.device, clock: StageClock
) -> Iterator[CellInputs]:
    """Rows of `long_n_kvs` keys, one draw of each of its families that is asked."""
    everyone = range(len(settings.candidates))
    for n_kv, family in long_kinds(settings):
        groups = _by_edges(settings, shape, n_kv) if _edged(family) else {(): everyone}
        for edges, candidates in groups.items():
            sizes = _sizes(_few_rows(settings), shape, n_kv, edges)
            with clock.stage("inputs drawn", n_kv):
                call = draw(family, sizes, settings.first_seed, device=device)
            yield CellInputs(
                shape=shape.name,
                n_kv=n_kv,
                family=family,
                seed=settings.first_seed,
                call=call,
                candidates=tuple(candidates),
                faults_alone=True,
            )


def long_kinds(settings: DiffSettings) -> list[tuple[int, str]]:
    """Lengths and families of the longer rows."""
    families = [family for family in LONG_FAMILIES if family in settings.families]
    return [(n_kv, family) for n_kv in settings.long_n_kvs for family in families]


class InputKind(NamedTuple):
    """What the inputs of a stratum have in common."""

    shape: str  # of the layer, by name
    n_kv: int  # visible keys
    family: str  # of inputs


class Look(NamedTuple):
    """Another look at a kind of input, of as many rows again as it has."""

    kind: InputKind
    look: int  # its number, from 2
    candidates: tuple[int, ...]  # numbers of those that it cannot decide about
    alone: bool  # single tokens are what it is for, or among that


def more_inputs(
    settings: DiffSettings, wanted: Sequence[Look], device: torch.device, clock: StageClock
) -> Iterator[CellInputs]:
    """As many inputs again as kinds have so far, by the seeds that follow theirs: what is drawn depends on
    the kind and the number of the look alone."""
    for of, look, undecided, alone in wanted:
        shape = shape_named(of.shape)
        by_edges = _by_edges(settings, shape, of.n_kv)
        groups = by_edges if _edged(of.family) else {(): range(len(settings.candidates))}
        before = settings.seeds * _calls_a_cell(settings) * 2 ** (look - 2)
        for edges, group in groups.items():
            candidates = tuple(i for i in group if i in undecided)
            if not candidates:
                continue
            sizes = _sizes(settings, shape, of.n_kv, edges)
            for seed in range(settings.first_seed + before, settings.first_seed + 2 * before):
                with clock.stage("inputs drawn", of.n_kv):
                    drawn = _drawn(of.family, sizes, seed, device, strict=settings.strict)
                yield CellInputs(
                    **of._asdict(),
                    seed=seed,
                    candidates=candidates,
                    look=look,
                    alone=alone,
                    **drawn,
                )


def _drawn(
    family: str, sizes: InputSizes, seed: int, device: torch.device, *, strict: bool
) -> dict[str, Any]:
    """The call of a cell, and what else the cell says of it (`CellInputs`)."""
    call = draw(family, sizes, seed, device=device)
    if (held := ALL_FAMILIES[family].unseen) is not None:
        return {"call": with_hidden(call, held.numbers), "known": call, "said_only": not strict}
    before = draw("gaussian", sizes, seed, device=device) if ALL_FAMILIES[family].after else None
    return {"call": call, "before": before}


def _few_rows(settings: DiffSettings) -> DiffSettings:
    """The same for inputs that show faults alone."""
    return replace(settings, rows=FEW_ROWS, most_rows=0, n_q=min(settings.n_q, FEW_ROWS))


def brief_sentence(settings: DiffSettings, n_kv: int) -> str:
    """What one of the `brief_n_kvs` is asked less; nothing where it is asked no probes."""
    if PROBES not in settings.families:
        return ""
    return f"{n_kv:,} keys: one-hot probes asked for each key once, of one KV head; --n-kv {n_kv} asks all"


def _calls_a_cell(settings: DiffSettings) -> int:
    """Calls that have a cell's rows, where one call has `n_q`."""
    return -(-settings.rows // settings.n_q) if settings.n_q else 1


def count_inputs(settings: DiffSettings) -> int | None:
    """How many inputs there will be, None where a folder decides."""
    if settings.captured_from is not None:
        return None
    total = 0
    for name in settings.shapes:
        for n_kv in settings.n_kvs:
            groups = len(_by_edges(settings, shape_named(name), n_kv))
            for family in settings.families:
                draws = 1 if family == PROBES else settings.seeds
                draws *= 1 if family not in FAMILIES else _calls_a_cell(settings)
                total += (groups if _edged(family) else 1) * draws
        for n_kv, family in long_kinds(settings):
            total += len(_by_edges(settings, shape_named(name), n_kv)) if _edged(family) else 1
    return total


def _edged(family: str) -> bool:
    """Whether inputs lie where plans cut."""
    return family == PROBES or ALL_FAMILIES[family].edged


def _by_edges(settings: DiffSettings, shape: ModelShape, n_kv: int) -> dict[tuple[int, ...], Sequence[int]]:
    """Candidates that have the same cuts, by them: no other candidate's cuts enter one's inputs."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, spec in enumerate(settings.candidates):
        edges = _edges((settings.baseline, spec), shape, n_kv, settings.path)
        found.setdefault(edges, []).append(i)
    return {edges: tuple(candidates) for edges, candidates in found.items()}


def check_settings(settings: DiffSettings, specs: Sequence[str] | None = None) -> None:
    """Refuse now what would be refused later: shapes, specifications, plans that do not fit a shape.

    specs: those to look at, all by default. Raises SpecError, UsageError.
    """
    shapes = [shape_named(name) for name in settings.shapes]
    check_shapes((settings.baseline, *settings.candidates) if specs is None else specs, shapes, settings.path)
    check_lengths(settings.n_kvs, shapes, torch.device(settings.device), sequences=settings.sequences)


def first_call(settings: DiffSettings, device: torch.device) -> CellInputs:
    """A small call for what a kernel shows only when it runs."""
    if settings.captured_from is not None:
        return next(captured_inputs(settings.captured_from, settings.path, device))
    shape, n_kv = shape_named(settings.shapes[0]), min(64, *settings.n_kvs)
    sizes = _sizes(replace(settings, rows=2), shape, n_kv, ())
    call = draw("gaussian", sizes, settings.first_seed, device=device)
    return CellInputs(shape.name, n_kv, "gaussian", settings.first_seed, call)


def plain_call(settings: DiffSettings, name: str, n_kv: int, device: torch.device) -> Call:
    """A small call of plain inputs of a shape and length, whatever families are asked."""
    few = replace(settings, rows=PLAIN_ROWS, most_rows=0, n_q=min(settings.n_q, PLAIN_ROWS))
    return draw(PLAIN, _sizes(few, shape_named(name), n_kv, ()), settings.first_seed, device=device)


def sizes_of_cell(settings: DiffSettings, shape: str, n_kv: int, family: str) -> InputSizes:
    """The sizes that a family of inputs, or `probes`, is drawn at for the first candidate."""
    named = shape_named(shape)
    by_edges = _by_edges(settings, named, n_kv)
    edges = next(edges for edges, which in by_edges.items() if 0 in which) if _edged(family) else ()
    if family == PROBES:
        settings = replace(settings, rows=2)
    elif family not in FAMILIES:
        settings = _few_rows(settings)
    return _sizes(settings, named, n_kv, edges)


def _sizes(settings: DiffSettings, shape: ModelShape, n_kv: int, edges: tuple[int, ...]) -> InputSizes:
    """Rows of n_kv keys, the second of fewer, the fourth of far fewer; on other paths than decode rows one
    after another, the last of n_kv. Every second sequence is shorter than the first.

    edges: where the plans of the kernels cut, and tiles end.
    """
    return InputSizes(
        n_kv=_rows(settings, n_kv),
        batch=settings.sequences,
        fewer=_fewer(settings, n_kv),
        heads=shape.heads,
        sliding_window=shape.sliding_window,
        sinks=shape.sinks,
        edges=edges,
        dtype=FLOAT_TYPES[settings.dtype].dtype,
        path=settings.path,
        v_in_k=shape.v_in_k,
    )


def _rows(settings: DiffSettings, n_kv: int) -> tuple[int, ...]:
    """Visible keys of each row of a cell's call."""
    if settings.path != "decode":
        return tuple(max(n_kv - t, 1) for t in reversed(range(settings.n_q or settings.rows)))
    rows = [n_kv] * settings.rows
    rows[1] = max(n_kv - 37, 1)
    rows[3:4] = [max(n_kv // 9, 1)] * len(rows[3:4])
    return tuple(rows)


def _fewer(settings: DiffSettings, n_kv: int) -> tuple[int, ...]:
    """Keys by which each sequence's rows are shorter."""
    return tuple(n_kv // (b + 2) + 1 if b % 2 else 0 for b in range(settings.sequences))


def lengths_to_read(settings: DiffSettings) -> tuple[int, ...]:
    """Visible keys to read a kernel at, so that something is known of every row that is drawn: the cells'
    lengths, those of longer rows, and that of the shortest row."""
    shortest = min(
        max(n - less, 1)
        for n_kv in settings.n_kvs
        for n in _rows(settings, n_kv)
        for less in _fewer(settings, n_kv)
    )
    return shortest, *settings.n_kvs, *settings.long_n_kvs


def _edges(specs: Sequence[str], shape: ModelShape, n_kv: int, path: AttentionPath) -> tuple[int, ...]:
    found: set[int] = set()
    for spec in specs:
        if parse_spec(spec).name in UNTOLD:
            continue
        kernel = build_kernel(spec)
        cuts_at = kernel.arithmetic(_shape_of(shape, n_kv), path).cuts_at
        found |= set(cuts_at(n_kv)[1:-1]) if cuts_at is not None else set()
    found |= {64 * (n_kv // 128), 64} if n_kv > 64 else set()
    inside = sorted(edge for edge in found if 0 < edge < n_kv)
    half = MOST_EDGES // 2
    return tuple(inside if len(inside) <= MOST_EDGES else inside[:half] + inside[-half:])


def _shape_of(shape: ModelShape, n_kv: int) -> Shape:
    return Shape(1, 2, n_kv, shape.heads)
