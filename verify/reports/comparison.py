"""Two runs of `verify ppl` side by side: what was asked differently, and what came out differently."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from verify.ppl.record import PplRun
from verify.reports.pictures import pictures
from verify.reports.record import StoredPpl, ppl_command
from verify.reports.templating import TEMPLATES, figure, flat, interval, percent

_SHOWN = ("distance", "drift", "own error", "nll", "kld")


class RunsRow(NamedTuple):
    """One row of the comparison: a figure of each run."""

    what: str
    first: str
    second: str

    @property
    def differs(self) -> bool:
        return self.first != self.second


def comparison_markdown(first: StoredPpl, second: StoredPpl) -> str:
    """The comparison as Markdown."""
    return TEMPLATES.get_template("comparison.md.j2").render(**_content(first, second))


def comparison_html(first: StoredPpl, second: StoredPpl) -> str:
    """The comparison as one page, each picture of one run beside the other's."""
    drawn = [pictures(stored, prefix=side) for stored, side in ((first, "a-"), (second, "b-"))]
    beside = [(drawn[0].get(name), drawn[1].get(name)) for name in _SHOWN if any(name in d for d in drawn)]
    return TEMPLATES.get_template("comparison.html.j2").render(**_content(first, second), beside=beside)


def _content(first: StoredPpl, second: StoredPpl) -> dict[str, Any]:
    a, b = first.run, second.run
    return {
        "a": a,
        "b": b,
        "folders": (str(first.folder), str(second.folder)),
        "commands": (ppl_command(a), ppl_command(b)),
        "warnings": list(_warnings(a, b)),
        "asked": [row for row in _side_by_side(_asked(a), _asked(b)) if row.differs],
        "found": list(_side_by_side(_figures(a), _figures(b))),
        "sentences": list(_same_arms(first, second)),
    }


def _warnings(a: PplRun, b: PplRun) -> Iterator[str]:
    """Why figures of the two cannot be laid beside each other."""
    hashes = (("model", a.model.fingerprint, b.model.fingerprint), ("text", a.corpus.sha256, b.corpus.sha256))
    for what, one, other in hashes:
        if one != other:
            yield f"not the same {what}: differences of perplexity say nothing about kernels"
    if (a.corpus.n_ctx, a.corpus.windows) != (b.corpus.n_ctx, b.corpus.windows):
        yield "not the same windows: other tokens were scored"


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
            f"{name}: would have seen": figure(pair.detectable_distance_ratio),
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


def _side_by_side(a: dict[str, str], b: dict[str, str]) -> Iterator[RunsRow]:
    for what in dict.fromkeys((*a, *b)):
        yield RunsRow(what, a.get(what, "-"), b.get(what, "-"))


def _same_arms(first: StoredPpl, second: StoredPpl) -> Iterator[str]:
    """Arms of one name and kernel in both runs, token by token."""
    theirs = {(arm.name, arm.spec, arm.path) for arm in second.run.arms}
    for arm in first.run.arms:
        name = arm.name
        if (name, arm.spec, arm.path) not in theirs or arm.role == "control":
            continue
        mine, other = (stored.column(name, "nll") for stored in (first, second))
        target, other_target = (stored.column(name, "target") for stored in (first, second))
        if not mine.size or not np.array_equal(target, other_target):
            continue
        if np.array_equal(mine, other):
            yield f"{name} ({arm.spec}): the same bits in both runs, {mine.size} tokens"
        else:
            difference = other - mine
            yield (
                f"{name} ({arm.spec}): nll of B - A is {difference.mean():+.2e} nats a token, at most"
                f" {np.abs(difference).max():.2e}"
            )
