"""The pages of `verify kld`, `sweep` and `identify`, from what their `--json` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from verify.engines.closing_table import HEADER, ClosingRow, cells
from verify.engines.kld_table import Estimate
from verify.reports.colours import BASELINE, CANDIDATES, HARM, ZERO
from verify.reports.drawing import Picture, finish, legend, new_figure, plain_numbers, plain_powers
from verify.reports.page import Page, PageTable, Section
from verify.reports.templating import figure, is_known

# What is listed one by one.
MOST_WINDOWS = 64


def kld_page(run: Mapping[str, Any], *, drawn: bool = True) -> Page:
    """Logits files against the first: the table that is published, then each pair."""
    rows = [cells(_closing_row(row)) for row in run["closing_table"]]
    closing = PageTable(HEADER, rows, ("file",))
    sections = [
        Section(heading="Closing table", table=closing, aside="Each against the first; ± one standard error.")
    ]
    for i, pair in enumerate(run["pairs"]):
        sections += _kld_sections(pair, f"c{i}-", several=len(run["pairs"]) > 1, drawn=drawn)
    files = [
        (
            PurePath(f["path"]).name,
            str(f["tokens"]),
            figure(f["clip_width"]),
            figure(f["step_median"], "%.2g"),
            str(f["top1_undecided"]),
            str(f["targets_clipped"]),
        )
        for f in run["files"]
    ]
    named = ("file", "tokens", "clipped, nats", "step, nats", "top tokens undecided", "at the clip")
    sections.append(
        Section(heading="What 16 bits hold", table=PageTable(named, files, ("file",)), folded=True)
    )
    return Page(
        command="kld",
        verdict=run["verdict"],
        reasons=run["reasons"] or ["one file, nothing to compare"],
        sections=sections,
        again=[run["again"]] if run.get("again") else [],
        facts=[("file", f["path"]) for f in run["files"]],
    )


def _closing_row(row: Mapping[str, Any]) -> ClosingRow:
    found = {name: row[name] for name in ClosingRow._fields[2:]}
    estimates = {name: e and Estimate(_number(e["value"]), _number(e["error"])) for name, e in found.items()}
    return ClosingRow(name=row["name"], size=row["size"], **estimates)


def _number(x: float | None) -> float:
    """JSON has null for NaN."""
    return math.nan if x is None else x


def _kld_sections(pair: Mapping[str, Any], prefix: str, *, several: bool, drawn: bool) -> list[Section]:
    name = f"{PurePath(pair['candidate']).name} against {PurePath(pair['reference']).name}"
    said = list(pair["reasons"]) if several else []
    if pair.get("dlnppl") is None:
        return [Section(heading=name, verdict=pair["verdict"], said=said)]
    low, high = (pair["dlnppl"][side] for side in ("low", "high"))
    interval = "too little data for an interval"
    if is_known(low) and is_known(high):
        interval = f"paired 99.9 % interval {low:+.3g} to {high:+.3g}"
    said.append(
        f"mean ln PPL(Q)/PPL(base) {pair['dlnppl']['mean']:+.3g}, {interval} (about"
        f" {pair['dlnppl']['scope']})"
    )
    resolution = pair["resolution"]
    said.append(
        f"the files resolve a mean KLD of {figure(resolution['mean_kld'])} and a mean ln PPL of"
        f" {figure(resolution['mean_nll'])}; smaller differences are not to be seen in them"
    )
    along = [{**x, "name": x["name"].removeprefix("n_kv ")} for x in pair["by_position"]]
    places, margins = _class_table("n_kv", along), _class_table("margin, nats", pair["by_margin"])
    worst = [
        (
            str(t["window"] + 1),
            str(t["position"]),
            figure(t["kld"]),
            figure(t["nll_base"], "%.4f"),
            figure(t["nll"], "%.4f"),
        )
        for t in pair["worst"]
    ]
    return [
        Section(
            heading=name,
            verdict=pair["verdict"],
            said=said,
            pictures=_kld_pictures(pair, prefix) if drawn else (),
        ),
        Section(heading="By position in the window", table=places),
        Section(heading="By margin of the base's top token", table=margins),
        Section(
            heading="Largest divergences",
            table=PageTable(("window", "position", "KLD", "nll in the base", "nll"), worst),
        ),
        Section(
            heading="By window",
            table=PageTable(
                ("window", "ln PPL(Q)/PPL(base)", "mean KLD"),
                [
                    (str(i + 1), figure(w["dlnppl"], "%+.3e"), figure(w["kld_mean"], "%.3e"))
                    for i, w in enumerate(pair["windows"][:MOST_WINDOWS])
                ],
            ),
            folded=True,
        ),
    ]


def _class_table(what: str, classes: Sequence[Mapping[str, Any]]) -> PageTable:
    rows = [
        (x["name"], str(x["tokens"]), str(x["changed"]), figure(x["dnll"], "%+.2e"), figure(x["kld"], "%.2e"))
        for x in classes
        if x["tokens"]
    ]
    return PageTable((what, "tokens", "top-1 changes", "mean nll difference", "mean KLD"), rows, (what,))


def _kld_pictures(pair: Mapping[str, Any], prefix: str) -> list[Picture]:
    """The divergence along the window, and window by window, beside what the files resolve."""
    resolves, drawn = pair["resolution"]["mean_kld"], []
    along = [x for x in pair["by_position"] if x["tokens"] and is_known(x["kld"])]
    for name, xlabel, values in (
        (
            "position",
            f"parts of the window, {along[0]['name']} first" if along else "",
            [x["kld"] for x in along],
        ),
        ("window", "window", [w["kld_mean"] for w in pair["windows"]]),
    ):
        known = [(i + 1, y) for i, y in enumerate(values) if is_known(y)]
        if len(known) < 2:
            continue
        picture, axis = new_figure()
        axis.plot(*zip(*known, strict=True), "o-", ms=4, lw=1, color=CANDIDATES[0], label="mean KLD")
        if is_known(resolves):
            axis.axhline(resolves, color=HARM, ls="--", lw=1, label="what the files resolve")
        # Rounding makes some means negative: those a logarithm would lose without a word.
        if min(y for _, y in known) > 0:
            axis.set_yscale("log")
            plain_powers(axis)
        else:
            axis.axhline(0, color=ZERO, lw=0.8)
            plain_numbers(axis)
        axis.set(xlabel=xlabel, ylabel="nats a token")
        axis.xaxis.get_major_locator().set_params(integer=True)
        legend(axis, 2)
        drawn.append(finish(prefix + name, picture, f"Mean KL divergence to the base by {name}."))
    return drawn


def sweep_page(run: Mapping[str, Any], *, drawn: bool = True) -> Page:
    """Speed logs against the first: what changed from which length on."""
    slower = [c for c in run["compared"] if c["slower"]]
    reasons = [
        f"{_work(c)}: {c['label']} takes {c['mean']:.3f} times as long as {c['against']}" for c in slower
    ]
    sections = [
        Section(
            heading="Times",
            said=run.get("said", ()),
            pictures=_sweep_pictures(run) if drawn else (),
            table=_times_table(run),
            aside="Seconds; of repeated rows the median. Ratio: over the file that it is compared with.",
        )
    ]
    notes = [f"{log['label']}: {note}" for log in run["logs"] for note in log["notes"]]
    return Page(
        command="sweep",
        verdict="slower" if slower else "not slower",
        reasons=reasons or [_no_slower(run)],
        notes=notes,
        sections=sections,
        again=[run["again"]] if run.get("again") else [],
        facts=[(log["label"], log["path"]) for log in run["logs"]],
    )


def _no_slower(run: Mapping[str, Any]) -> str:
    means = [c["mean"] for c in run["compared"] if is_known(c["mean"])]
    if not means:
        return "there is nothing to compare"
    return f"mean ratios of times are {min(means):.4f} to {max(means):.4f}"


def _work(compared: Mapping[str, Any]) -> str:
    return "generation" if compared["column"] == "t_tg" else "prompt processing"


def _times_table(run: Mapping[str, Any]) -> PageTable:
    columns, cells = ["N_KV"], []
    for column, name in (("t_tg", "T_TG"), ("t_pp", "T_PP")):
        for log in run["logs"]:
            times: dict[int, list[float]] = {}
            for row in log["rows"]:
                if is_known(row[column]):
                    times.setdefault(row["n_kv"], []).append(row[column])
            columns.append(f"{name} {log['label']}")
            cells.append({n: f"{sorted(ts)[len(ts) // 2]:.3f}" for n, ts in times.items()})
        for c in run["compared"]:
            if c["column"] == column:
                columns.append(f"ratio {c['label']}")
                cells.append({n: f"{r:.4f}" for n, r in zip(c["depths"], c["ratios"], strict=True)})
    depths = sorted({row["n_kv"] for log in run["logs"] for row in log["rows"]})
    return PageTable(columns, [[str(n), *(cell.get(n, "") for cell in cells)] for n in depths])


def _sweep_pictures(run: Mapping[str, Any]) -> list[Picture]:
    """Ratios of times by depth, generation and prompt processing apart."""
    drawn = []
    for column, work in (("t_tg", "generation"), ("t_pp", "prompt processing")):
        of_column = [c for c in run["compared"] if c["column"] == column]
        if not of_column:
            continue
        picture, axis = new_figure()
        axis.axhline(1, color=ZERO, lw=0.8)
        for c, colour in zip(of_column, CANDIDATES, strict=False):
            axis.plot(
                c["depths"],
                c["ratios"],
                "o-",
                ms=4,
                lw=1,
                color=colour,
                label=f"{c['label']} / {c['against']}",
            )
            if c["change"] and c["change"]["believed"]:
                axis.axvline(c["change"]["n_kv"], color=colour, ls=":", lw=1)
        deepest = max(n for c in of_column for n in c["depths"])
        starts = [
            start for start in run["split_starts"] if column == "t_tg" and start["padded"] <= 1.2 * deepest
        ]
        for start in starts:
            axis.axvline(start["padded"], color=BASELINE, ls="--", lw=1)
        axis.set(xlabel="N_KV", ylabel="ratio of times")
        legend(axis, len(of_column))
        caption = f"Time of {work} over that of the file compared with. Dotted: a change point."
        if starts:
            caption += " Dashed: where the policy changes its plan."
        drawn.append(finish(f"ratio {column}", picture, caption))
    return drawn


def identify_page(run: Mapping[str, Any], *, drawn: bool = True) -> Page:
    """An arithmetic by stretches of lengths."""
    rows = [
        (
            f"{r['n_kv_min']} to {r['n_kv_max']}" if r["n_kv_max"] > r["n_kv_min"] else str(r["n_kv_min"]),
            str(r["n_q_max"]),
            r["said"],
        )
        for r in run["regimes"]
    ]
    found = run["identifiable"]
    verdict = "contradicts itself" if run["contradictions"] else "identified" if found else "not identifiable"
    first = [r["said"] for r in run["regimes"] if r["identifiable"]]
    reasons = [f"{run['spec']} {each}" for each in run["contradictions"]] or run["reasons"] or first[:1]
    sections = [
        Section(
            heading="What was seen, by length",
            table=PageTable(("n_kv", "n_q", "arithmetic"), rows, ("n_kv", "arithmetic")),
            aside="From q, k, v and the result alone; head groups are not observable, heads share nothing.",
        )
    ]
    for r in run["regimes"]:
        if r["identifiable"]:
            told = [(what, str(how)) for what, how in r["confidence"].items()]
            sections.append(
                Section(
                    heading=f"How it was told, n_kv {r['n_kv_min']} to {r['n_kv_max']}, n_q {r['n_q_max']}",
                    table=PageTable(("what", "by"), told, ("what", "by")),
                    folded=True,
                )
            )
    return Page(
        command="identify",
        verdict=verdict,
        reasons=reasons or ["no reason was given"],
        notes=[f"not looked at: {each}" for each in run["not_looked_at"]],
        subject=f"Kernel {run['spec']} on {run['device']}, {run['seconds']:.3g} s.",
        sections=sections,
        again=[run["again"]] if run.get("again") else [],
        facts=[("device", run["device"])],
    )
