"""The operator test that engines lack: one law, within its own budget, over calls that engines make.

An engine's own test of flash attention draws a few shapes and allows a mean error over the whole tensor that
hides a dropped key. Here every element is held against its own rounding budget, on the ratios, query tokens,
head sizes and lengths at which kernels change: on either side of each threshold, with sinks, windows,
softcaps, ALiBi and quantised caches. A cell is one call; the grid is fixed, so that a cell has a name that
two builds share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from verify.kernels.errors import SpecError
from verify.laws.cases import Problem
from verify.laws.law import LAWS, Subject
from verify.laws.run import LawResult, try_case

RATIOS = (6, 10, 12, 16, 20)
QUERY_TOKENS = (1, 2, 4, 8)
# Of k and v: all that engines have kernels for, MLA's among them.
HEAD_SIZES = ((64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (192, 128), (256, 256), (320, 256),
              (512, 512), (576, 512))  # fmt: skip
# Lengths at which engines compare, padded to 256: the last before each, itself, the next.
THRESHOLDS = (256, 2048, 8192)
CACHES = ("q8_0", "q4_0")
OPTIONS = ("sinks", "window", "softcap", "alibi")
LAW = "within-budget"


class GridCell(NamedTuple):
    """One call. group: what varies; name: the same in every run."""

    group: str
    name: str
    problem: Problem


def cells() -> Iterator[GridCell]:
    """The grid, short calls first in every group."""
    for ratio in RATIOS:
        for threshold in THRESHOLDS:
            for n_kv in (threshold - 1, threshold, threshold + 1):
                yield _cell("length", ratio, 1, (128, 128), n_kv)
    for ratio in RATIOS:
        for n_q in QUERY_TOKENS[1:]:
            for n_kv in (300, 2049):
                yield _cell("query tokens", ratio, n_q, (128, 128), n_kv)
    for sizes in HEAD_SIZES:
        for ratio in (4, *RATIOS):
            for n_q in (1, 4):
                yield _cell("head size", ratio, n_q, sizes, 310)
    for family in OPTIONS:
        for ratio in RATIOS:
            for n_q in (1, 4):
                yield _cell("options", ratio, n_q, (128, 128), 700, family=family)
    for cache in CACHES:
        for ratio in RATIOS:
            for n_q in (1, 2, 4):
                yield _cell("caches", ratio, n_q, (128, 128), 700, cache=cache)


def run_cell(subject: Subject, cell: GridCell) -> LawResult:
    """Whether a kernel keeps its budget there; not applicable where it does not take such a call."""
    law = LAWS[LAW]
    has, problem = subject.capabilities, cell.problem
    why = ""
    if problem.family in OPTIONS and not getattr(has, _PROMISES[problem.family]):
        why = f"it states no {problem.family}"
    elif problem.path not in has.paths:
        why = f"it does not take the {problem.path} path"
    elif has.ratios is not None and problem.ratio not in has.ratios:
        why = f"it does not take r = {problem.ratio}"
    elif problem.cache and problem.cache not in has.caches:
        why = f"it keeps no cache of {problem.cache} when it is asked to"
    if why:
        return LawResult(law, "not applicable", reason=why)
    if problem.cache:
        try:
            subject = replace(subject, kernel=subject.variant({"cache": problem.cache}))
        except SpecError as error:
            return LawResult(law, "not applicable", reason=str(error))
    return try_case(law, subject, problem)


def run_grid(
    subject: Subject, *, on_cell: Callable[[int, int], None] = lambda done, total: None
) -> list[tuple[GridCell, LawResult]]:
    """Every cell, in order. A kernel that dies in a cell is started anew for the next."""
    grid = list(cells())
    found = []
    for i, cell in enumerate(grid, 1):
        found.append((cell, run_cell(subject, cell)))
        if found[-1][1].state == "broken":
            subject.kernel.forgive()
        on_cell(i, len(grid))
    return found


_PROMISES = {"sinks": "sinks", "window": "sliding_window", "softcap": "softcap", "alibi": "alibi"}


def _cell(
    group: str,
    ratio: int,
    n_q: int,
    sizes: tuple[int, int],
    n_kv: int,
    *,
    family: str = "gaussian",
    cache: str = "",
) -> GridCell:
    k_size, v_size = sizes
    size = str(k_size) if k_size == v_size else f"{k_size}/{v_size}"
    name = f"r={ratio},n_q={n_q},size={size},n_kv={n_kv}"
    if family != "gaussian":
        name += f",{family}"
    if cache:
        name += f",cache={cache}"
    problem = Problem(
        family=family,
        # The newest n_q tokens: each sees one key more than the one before.
        n_kv=tuple(range(n_kv - n_q + 1, n_kv + 1)),
        kv_heads=1 if k_size > 256 else 2,
        ratio=ratio,
        k_size=k_size,
        v_size=v_size,
        path="decode" if n_q == 1 else "prefill",
        cache=cache,
    )
    return GridCell(group, name, problem)
