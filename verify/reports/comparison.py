"""Runs of one command side by side: what was asked differently, and what came out differently.

Runs of `verify ppl` on the same tokens are compared token by token: a difference of two perplexities has a
paired error, which is far smaller than either perplexity's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np

from verify.judge.statistics import paired_difference
from verify.machine.errors import UsageError
from verify.ppl.record import PplRun
from verify.reports.page import Page, PageTable, Section
from verify.reports.pages import page_of
from verify.reports.pictures import pictures
from verify.reports.record import StoredGen, StoredPage, StoredPpl, gen_command, ppl_command
from verify.reports.templating import figure, flat, interval, least_ratio, percent

_SHOWN = ("distance", "drift", "own error", "nll", "kld")
Stored = StoredPpl | StoredGen | StoredPage


class RunsRow(NamedTuple):
    """One row of the comparison: a figure of each run."""

    what: str
    values: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


def comparison_page(stored: Sequence[Stored], *, drawn: bool = True) -> Page:
    """Two runs or more, of one command; drawn: with pictures. Raises UsageError."""
    if len(stored) > len(ascii_uppercase):
        raise UsageError(f"report: expected at most {len(ascii_uppercase)} runs, got {len(stored)}")
    commands = list(dict.fromkeys(_command_of(one) for one in stored))
    if len(commands) > 1:
        raise UsageError(
            f"{stored[-1].folder}: runs of verify {' and '.join(commands)}, expected runs of one command"
        )
    runs = dict(zip(ascii_uppercase, stored, strict=False))
    of_ppl = {name: one for name, one in runs.items() if isinstance(one, StoredPpl)}
    sections = _ppl_sections(of_ppl, drawn=drawn) if of_ppl else _other_sections(runs)
    first, *others = of_ppl.items() or [("", None)]
    notes = [
        note
        for name, one in others
        if one is not None and first[1] is not None
        for note in _warnings(name, first[1].run, one.run)
    ]
    return Page(
        command="report",
        verdict=f"{len(stored)} runs of verify {commands[0]}",
        reasons=[f"{name}: {_verdict(one)}: {one.folder}" for name, one in runs.items()],
        notes=notes,
        sections=sections,
        again=[_again(one) for one in stored],
    )


def _command_of(one: Stored) -> str:
    return str(one.run["command"]) if isinstance(one, StoredPage) else one.run.command


def _verdict(one: Stored) -> str:
    return page_of(one.run, drawn=False).verdict if isinstance(one, StoredPage) else one.run.verdict


def _again(one: Stored) -> str:
    if isinstance(one, StoredPage):
        return str(one.run.get("again") or "")
    return ppl_command(one.run) if isinstance(one, StoredPpl) else gen_command(one.run)


def _ppl_sections(runs: Mapping[str, StoredPpl], *, drawn: bool) -> list[Section]:
    names = tuple(runs)
    asked = [row for row in _side_by_side([_asked(one.run) for one in runs.values()]) if row.differs]
    figures = _side_by_side([_figures(one.run) for one in runs.values()])
    sections = [
        Section(
            heading="Paired differences",
            said=[*_same_bits(runs)],
            table=PageTable(
                ("arm", "kernel", "run", "tokens", "ln PPL - A's", "largest difference of a token"),
                list(_paired(runs)),
                ("arm", "kernel", "run"),
            ),
            aside="Token by token against the first run's arm of that name, on the same tokens; ± one"
            " standard error of the paired difference, over blocks of tokens.",
        ),
        Section(heading="Figures", table=_table(figures, names)),
        Section(
            heading="Asked for, or ran on",
            said=[] if asked else ["Settings and environment are the same."],
            table=_table(asked, names),
        ),
    ]
    if drawn:
        made = {name: pictures(one, prefix=f"{name.lower()}-") for name, one in runs.items()}
        for shown in _SHOWN:
            beside = [
                p._replace(caption=f"{name}: {p.caption}")
                for name, found in made.items()
                if (p := found.get(shown))
            ]
            if beside:
                sections.append(Section(heading=shown.capitalize(), pictures=beside))
    return sections


def _other_sections(runs: Mapping[str, Stored]) -> list[Section]:
    """Verdicts and reasons; of diffs the figures of each length too."""
    sections = []
    pages = {name: one.run for name, one in runs.items() if isinstance(one, StoredPage)}
    of_diff = [run for run in pages.values() if run["command"] == "diff"]
    if of_diff:
        found = _side_by_side([_diff_figures(run) for run in of_diff])
        sections.append(Section(heading="Figures", table=_table(found, tuple(runs))))
    for name, one in runs.items():
        if isinstance(one, StoredPage):
            page = page_of(one.run, drawn=False)
            verdict, reasons = page.verdict, page.reasons
        else:
            verdict, reasons = one.run.verdict, one.run.reasons
        sections.append(Section(heading=name, verdict=verdict, said=reasons))
    return sections


def _diff_figures(run: Mapping[str, Any]) -> dict[str, str]:
    figures = {"verdict": str(run["verdict"])}
    for pair in run["pairs"]:
        figures[f"{pair['candidate']}: verdict"] = pair["verdict"]
        for line in pair.get("lines", ()):
            where = f"{pair['candidate']}: {line['shape']} at {line['n_kv']} keys"
            figures[f"{where}: err/budget"] = figure(line["budget"])
            figures[f"{where}: rms ratio"] = line["ratio"]
    return figures


def _warnings(name: str, a: PplRun, b: PplRun) -> Iterator[str]:
    """Why figures of a run cannot be laid beside the first's."""
    hashes = (("model", a.model.fingerprint, b.model.fingerprint), ("text", a.corpus.sha256, b.corpus.sha256))
    for what, one, other in hashes:
        if one != other:
            yield f"{name}: not the same {what}: differences of perplexity say nothing about kernels"
    if (a.corpus.n_ctx, a.corpus.windows) != (b.corpus.n_ctx, b.corpus.windows):
        yield f"{name}: not the same windows: other tokens were scored"


def _asked(run: PplRun) -> dict[str, str]:
    """Settings and environment."""
    asked = {
        "model": run.model.path,
        "model fingerprint": run.model.fingerprint[:16],
        "text": run.corpus.source,
        "text sha256": run.corpus.sha256[:16],
    }
    asked |= {name: str(value) for name, value in flat(run.settings) if name not in ("model", "file")}
    return asked | {name: str(value) for name, value in flat(run.environment)}


def _figures(run: PplRun) -> dict[str, str]:
    """The figures of every arm and pair, by what they are of."""
    figures = {"verdict": run.verdict}
    for arm in run.arms:
        if arm.role in ("control", "noise"):
            continue
        ppl = f"{figure(arm.ppl, '%.4f')} +/- {figure(arm.ppl_se, '%.5f')}"
        figures[f"{arm.name}: PPL"] = "failed" if arm.failure else ppl
        if arm.role != "exact":
            figures[f"{arm.name}: KLD to exact"] = figure(arm.kld_to_exact_mean, "%.2e")
    for pair in run.pairs:
        name = pair.candidate
        figures |= {
            f"{name}: kernel": next(arm.spec for arm in run.arms if arm.name == name),
            f"{name}: verdict": pair.verdict,
            f"{name}: distance ratio": (
                f"{figure(pair.distance_ratio)} ({interval(pair.distance_ratio_ci)})"
            ),
            f"{name}: would have seen": least_ratio(pair.detectable_distance_ratio),
            f"{name}: ln PPL difference": (
                f"{figure(pair.dlnppl, '%+.2e')} +/- {figure(pair.dlnppl_se, '%.1e')}"
            ),
            f"{name}: KLD to baseline": figure(pair.kld_mean, "%.2e"),
            f"{name}: top-1 changes": f"{pair.top1_changes} of {pair.tokens}",
            f"{name}: changed plan": percent(pair.coverage),
        }
    for line in run.in_place:
        figures[f"{line.arm}: error / budget"] = figure(line.max_budget_ratio)
        figures[f"{line.arm}: relative rms error"] = figure(line.relative_rms)
    return figures


def _side_by_side(found: Sequence[Mapping[str, str]]) -> list[RunsRow]:
    names = dict.fromkeys(name for figures in found for name in figures)
    return [RunsRow(what, tuple(figures.get(what, "-") for figures in found)) for what in names]


def _table(rows: Sequence[RunsRow], names: Sequence[str]) -> PageTable:
    return PageTable(("", *names), [(row.what, *row.values) for row in rows], ("", *names))


def _common(runs: Mapping[str, StoredPpl]) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """(arm, run, nll in the first run, nll there) of arms that another run has too, on the same tokens."""
    (_, first), *others = runs.items()
    for arm in first.run.arms:
        if arm.role in ("control", "noise"):
            continue
        mine, target = (first.column(arm.name, name) for name in ("nll", "target"))
        for name, other in others:
            theirs, other_target = (other.column(arm.name, column) for column in ("nll", "target"))
            if mine.size and np.array_equal(target, other_target):
                yield arm.name, name, mine, theirs


def _specs(runs: Mapping[str, StoredPpl], arm: str, name: str) -> tuple[str, str]:
    """An arm's kernel in the first run, and in another."""
    first, *_ = runs.values()
    mine, theirs = (next(a.spec for a in one.run.arms if a.name == arm) for one in (first, runs[name]))
    return mine, theirs


def _same_bits(runs: Mapping[str, StoredPpl]) -> Iterator[str]:
    for arm, name, mine, theirs in _common(runs):
        if np.array_equal(mine, theirs):
            spec = _specs(runs, arm, name)[1]
            yield f"{arm} ({spec}): the same bits in A and {name}, {mine.size} tokens"


def _paired(runs: Mapping[str, StoredPpl]) -> Iterator[tuple[str, ...]]:
    first, *_ = runs.values()
    for arm, name, mine, theirs in _common(runs):
        windows = len(np.unique(first.column(arm, "window")))
        shape = (windows, -1) if windows and mine.size % windows == 0 else (1, -1)
        found = paired_difference(theirs.reshape(shape), mine.reshape(shape))
        before, after = _specs(runs, arm, name)
        kernel = before if before == after else f"{before}, then {after}"
        difference = f"{figure(found.mean, '%+.2e')} ± {figure(found.se, '%.1e')}"
        largest = figure(float(np.abs(theirs - mine).max()), "%.2e")
        yield arm, kernel, name, str(mine.size), difference, largest
