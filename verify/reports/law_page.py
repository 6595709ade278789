"""The pages of `verify props` and `verify judge`, from what their `--json` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from verify.machine.terminal import counted
from verify.reports.colours import BASELINE, HARM
from verify.reports.drawing import Picture, finish, new_figure, plain_powers
from verify.reports.page import Page, PageTable, Section
from verify.reports.templating import flat, is_known

LawFound = Mapping[str, Any]
# Broken laws that are told beside the verdict, and those with a section of their own: the first.
MOST_REASONS, MOST_BROKEN = 3, 5
# Broken calls of the engine profile whose command is given.
MOST_AGAIN = 5


def props_page(run: Mapping[str, Any], *, drawn: bool = True) -> Page:
    """Laws against a kernel, what broke first. A run of `--profile engine` is its cells."""
    facts = [("device", run["device"]), *flat(run.get("environment") or {})]
    common: dict[str, Any] = {"command": "props", "subject": f"Kernel {run['spec']}.", "facts": facts}
    common["again"] = [run["again"]] if run.get("again") else []
    if "laws" not in run:
        return _grid_page(run, common)
    by = {
        state: [law for law in run["laws"] if law["state"] == state]
        for state in ("broken", "holds", "not applicable")
    }
    held, examples = len(by["holds"]), sum(law["examples"] for law in run["laws"])
    reasons = [f"{law['name']}: {law['reason']}" for law in by["broken"][:MOST_REASONS]]
    idle = len(by["not applicable"])
    said = f"{held} of {len(run['laws'])} laws hold, {idle} not applicable; {counted(examples, 'case')}"
    sections = [_broken(law) for law in by["broken"][:MOST_BROKEN]]
    if rest := by["broken"][MOST_BROKEN:]:
        rows = [(law["name"], law["reason"], law["again"] or "") for law in rest]
        more = PageTable(("law", "found", "again"), rows, ("law", "found", "again"))
        sections.append(Section(heading=f"{counted(len(rest), 'more law')} broken", table=more))
    if by["holds"]:
        sections.append(
            Section(
                heading="Laws that hold",
                pictures=_margins(by["holds"]) if drawn else (),
                table=_laws_table(by["holds"]),
                aside="Tightest margin: the largest error in units of the law's tolerance, 1 at most; laws of"
                " bits have none to spare.",
            )
        )
    if by["not applicable"]:
        idle_rows = [(law["name"], law["reason"]) for law in by["not applicable"]]
        table = PageTable(("law", "why"), idle_rows, ("law", "why"))
        sections.append(
            Section(heading=f"{counted(len(idle_rows), 'law')} not applicable", table=table, folded=True)
        )
    verdict = "broken" if by["broken"] else "holds" if held else "nothing shown"
    return Page(verdict=verdict, reasons=[*reasons, said], sections=sections, **common)


def _broken(law: LawFound) -> Section:
    return Section(
        heading=law["name"],
        verdict="broken",
        said=[law["statement"], f"tolerance: {law['tolerance']}", f"found: {law['reason']}"],
        code=[law["again"]] if law["again"] else (),
    )


def _laws_table(laws: Sequence[LawFound]) -> PageTable:
    rows = []
    for law in laws:
        margin = law["margin"]
        told = "exact" if margin == 0 else f"{margin:.2g} of 1" if is_known(margin) else "-"
        reserved = f" ({law['reason']})" if law["reason"] else ""
        rows.append((law["name"], law["statement"] + reserved, str(law["examples"]), told))
    return PageTable(("law", "what it says", "cases", "tightest margin"), rows, ("law", "what it says"))


def _margins(laws: Sequence[LawFound]) -> list[Picture]:
    """How near to its tolerance each law that holds came."""
    known = [(law["name"], law["margin"]) for law in laws if is_known(law["margin"]) and law["margin"] > 0]
    if not known:
        return []
    known.sort(key=lambda each: each[1])
    figure, axis = new_figure(height=min(0.9 + 0.2 * len(known), 6.0), left=1.7)
    axis.barh(range(len(known)), [margin for _, margin in known], color=BASELINE, height=0.6)
    axis.axvline(1, color=HARM, ls="--", lw=1)
    axis.set_yticks(range(len(known)), [name for name, _ in known])
    axis.set(xscale="log", xlabel="largest error over the law's tolerance")
    plain_powers(axis, along="x")
    return [
        finish("margins", figure, "How near to its tolerance each law came; at the dashed line it breaks.")
    ]


def _grid_page(run: Mapping[str, Any], common: Mapping[str, Any]) -> Page:
    counts = Counter(cell["state"] for cell in run["cells"])
    broken = [cell for cell in run["cells"] if cell["state"] == "broken"]
    rows = [(f"{cell['group']}: {cell['name']}", cell["reason"]) for cell in broken]
    sections = [
        Section(
            heading="Calls that are broken",
            table=PageTable(("call", "why"), rows, ("call", "why")),
            code=[cell["again"] for cell in broken[:MOST_AGAIN] if cell["again"]],
        )
    ]
    said = ", ".join(f"{count} {state}" for state, count in counts.items())
    verdict = "broken" if broken else "holds" if counts["holds"] else "nothing shown"
    return Page(
        verdict=verdict,
        reasons=[f"calls as engines make them: {said}"],
        sections=sections if rows else [],
        **common,
    )


def judge_page(run: Mapping[str, Any], *, drawn: bool = True) -> Page:
    """A kernel that nobody trusts: inputs, laws and cheats, what failed first."""
    bad = ("broken", "caught")
    laws = [(law["name"], law["state"], law["reason"]) for law in run["laws"]]
    checks = [(c["name"], c["state"], c["said"] or c["what"]) for c in run["checks"]]
    asked = [*run["reasons"]] or ["errors within budgets, laws hold, no cheat caught"]
    first, *rest = asked
    sections = [Section(heading="All that was found", said=rest)] if rest else []
    sections += [
        Section(
            heading=heading,
            table=PageTable(
                (what, "", "said"), sorted(rows, key=lambda row: row[1] not in bad), (what, "", "said")
            ),
        )
        for heading, what, rows in (
            ("Inputs", "path", [(path, verdict, "") for path, verdict in run["inputs"].items()]),
            ("Ways to look right", "check", checks),
            ("Laws", "law", laws),
        )
        if rows
    ]
    seconds = run["seconds"]
    took = f" Median of a call on fresh inputs: {seconds * 1e3:.3g} ms." if is_known(seconds) else ""
    return Page(
        command="judge",
        verdict=run["verdict"],
        reasons=[first],
        notes=run["notes"],
        subject=f"Kernel {run['spec']}.{took}",
        sections=sections,
        again=[run["again"]] if run.get("again") else [],
        facts=list(flat(run["environment"])),
    )
