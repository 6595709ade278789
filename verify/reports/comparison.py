"""Two runs of `verify ppl` side by side: what was asked differently, and what came out differently."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from verify.machine.errors import UsageError
from verify.reports.pictures import pictures
from verify.reports.record import RunRecord, command_line
from verify.reports.templating import TEMPLATES, figure, flat, interval, percent

_SHOWN = ("distance", "drift", "own error", "nll", "kld")


class Line(NamedTuple):
    """One row of the comparison: a figure of each run."""

    what: str
    first: str
    second: str

    @property
    def differs(self) -> bool:
        return self.first != self.second


def comparison_markdown(first: RunRecord, second: RunRecord) -> str:
    """The comparison as Markdown. Raises UsageError for runs of another command."""
    return TEMPLATES.get_template("comparison.md.j2").render(**_content(first, second))


def comparison_html(first: RunRecord, second: RunRecord) -> str:
    """The comparison as one page, each picture of one run beside the other's."""
    drawn = [pictures(record, prefix=side) for record, side in ((first, "a-"), (second, "b-"))]
    beside = [(drawn[0].get(name), drawn[1].get(name)) for name in _SHOWN if any(name in d for d in drawn)]
    return TEMPLATES.get_template("comparison.html.j2").render(**_content(first, second), beside=beside)


def _content(first: RunRecord, second: RunRecord) -> dict[str, Any]:
    for record in (first, second):
        if record.run["command"] != "ppl":
            raise UsageError(f"{record.folder}: a run of verify {record.run['command']}, expected verify ppl")
    a, b = first.run, second.run
    return {
        "a": a,
        "b": b,
        "folders": (str(first.folder), str(second.folder)),
        "commands": (command_line(a), command_line(b)),
        "warnings": list(_warnings(a, b)),
        "asked": [line for line in _side_by_side(_asked(a), _asked(b)) if line.differs],
        "found": list(_side_by_side(_found(a), _found(b))),
        "sentences": list(_same_arms(first, second)),
    }


def _warnings(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """Why figures of the two cannot be laid beside each other."""
    for what, key in (("model", "fingerprint"), ("text", "sha256")):
        of = "model" if what == "model" else "corpus"
        if a[of][key] != b[of][key]:
            yield f"not the same {what}: differences of perplexity say nothing about kernels"
    sizes = [(run["corpus"]["n_ctx"], run["corpus"]["windows"]) for run in (a, b)]
    if sizes[0] != sizes[1]:
        yield "not the same windows: other tokens were scored"


def _asked(run: dict[str, Any]) -> dict[str, str]:
    """Settings and environment."""
    asked = {
        "model": run["model"]["path"],
        "model fingerprint": run["model"]["fingerprint"][:16],
        "text": run["corpus"]["source"],
        "text sha256": run["corpus"]["sha256"][:16],
    }
    asked |= {name: str(value) for name, value in flat(run["settings"]) if name not in ("model", "file")}
    return asked | {name: str(value) for name, value in flat(run["environment"])}


def _found(run: dict[str, Any]) -> dict[str, str]:
    """The figures of every arm and pair."""
    found = {"verdict": run["verdict"]}
    for arm in run["arms"]:
        if arm["role"] in ("control", "noise"):
            continue
        name = arm["name"]
        found[f"{name}: PPL"] = (
            "failed"
            if arm["failure"]
            else f"{figure(arm['ppl'], '%.4f')} +/- {figure(arm['ppl_se'], '%.5f')}"
        )
        if arm["role"] != "exact":
            found[f"{name}: KLD to exact"] = figure(arm["kld_to_exact_mean"], "%.2e")
    for pair in run["pairs"]:
        name = pair["candidate"]
        found[f"{name}: kernel"] = next(arm["spec"] for arm in run["arms"] if arm["name"] == name)
        found[f"{name}: verdict"] = pair["verdict"]
        found[f"{name}: distance ratio"] = (
            f"{figure(pair['distance_ratio'])} ({interval(pair['distance_ratio_ci'])})"
        )
        found[f"{name}: would have seen"] = figure(pair["detectable_distance_ratio"])
        found[f"{name}: ln PPL difference"] = (
            f"{figure(pair['dlnppl'], '%+.2e')} +/- {figure(pair['dlnppl_se'], '%.1e')}"
        )
        found[f"{name}: KLD to baseline"] = figure(pair["kld_mean"], "%.2e")
        found[f"{name}: top-1 changes"] = f"{pair['top1_changes']} of {pair['tokens']}"
        found[f"{name}: changed plan"] = percent(pair["coverage"])
    for line in run["in_place"]:
        found[f"{line['arm']}: error / budget"] = figure(line["max_budget_ratio"])
        found[f"{line['arm']}: relative rms error"] = figure(line["relative_rms"])
    return found


def _side_by_side(a: dict[str, str], b: dict[str, str]) -> Iterator[Line]:
    for what in dict.fromkeys((*a, *b)):
        yield Line(what, a.get(what, "-"), b.get(what, "-"))


def _same_arms(first: RunRecord, second: RunRecord) -> Iterator[str]:
    """Arms of one name and kernel in both runs, token by token."""
    theirs = {(arm["name"], arm["spec"], arm["path"]) for arm in second.arms}
    for arm in first.arms:
        name = arm["name"]
        if (name, arm["spec"], arm["path"]) not in theirs or arm["role"] == "control":
            continue
        mine, other = (record.column(name, "nll") for record in (first, second))
        target, other_target = (record.column(name, "target") for record in (first, second))
        if not mine.size or not np.array_equal(target, other_target):
            continue
        if np.array_equal(mine, other):
            yield f"{name} ({arm['spec']}): the same bits in both runs, {mine.size} tokens"
        else:
            difference = other - mine
            yield (
                f"{name} ({arm['spec']}): nll of B - A is {difference.mean():+.2e} nats a token, at most"
                f" {np.abs(difference).max():.2e}"
            )
