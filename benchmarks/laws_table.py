"""The table of docs/laws.md: every law against every kernel that is here.

    python benchmarks/laws_table.py SPEC ... [--device cuda] [--examples 100] [--name cpu]

runs `verify props` on each, keeps what was found in benchmarks/results/laws-NAME.json, and writes
docs/laws.md anew from all such files. SHOWN==SPEC gives a kernel another name on the page. Without a SPEC it
only writes the page. What stands below the marker on that page is written by hand, and stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from commit import commit

from verify.laws import LAWS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/laws.md"
BY_HAND = "<!-- what follows is written by hand -->"
HEAD = """# Laws: what holds for every right kernel, and for which it was seen to hold

`verify props SPEC` asks a kernel every law below. Each is a function in `verify/laws/`, tried on cases that
hypothesis draws and shrinks; its tolerance is derived (`docs/numerics.md`, `kernels/budget/merge_bound.py`),
never a constant, and `tests/properties/test_law_faults.py` shows that it fails on a known fault. Two results
that exact arithmetic would make equal may differ by both their error budgets: a margin of 0.3 means that
they came to differ by 0.3 of what rounding may do.

Hypothesis looks around a few neighbourhoods of cases. So up to half of the cases of a law are not left to
chance (`verify/laws/draws.py`): one for every family of inputs, for head sizes 72, 80, 96, 192/128, 256 and
576/512, for ratios from 5 to 64, and for kinds of calls: rows far apart, lengths that are multiples of
nothing, four and eight query tokens, four sequences of unlike lengths, nine sequences, 1,101 keys. With fewer
than twice as many examples as there are of these, some are tried, evenly.

This page is written by `benchmarks/laws_table.py` from runs kept in `benchmarks/results/laws-*.json`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("specs", nargs="*", help="kernel specifications, or SHOWN==SPEC")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--name", default="", help="of the file of results; default: the device")
    chosen = parser.parse_args()
    path = RESULTS / f"laws-{chosen.name or chosen.device}.json"
    found = json.loads(path.read_text()) if path.is_file() else []
    for text in chosen.specs:
        shown, spec = text.split("==", 1) if "==" in text else (text, text)
        print(f"{shown} on {chosen.device}", file=sys.stderr, flush=True)
        run = props(spec, chosen.device, chosen.examples)
        # In its own place: columns stay where they were.
        by_name = {old["shown"]: old for old in found} | {shown: {"shown": shown, **run}}
        found = list(by_name.values())
        path.write_text(json.dumps(found, indent=1) + "\n")
    write_page()


def props(spec: str, device: str, examples: int) -> dict[str, Any]:
    """What `verify props --json` prints, from seed 0."""
    command = [sys.executable, "-m", "verify", "props", spec, "--device", device]
    command += ["--examples", str(examples), "--seed", "0", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{spec}: exit {done.returncode}: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    result["environment"] = {
        key: result["environment"].get(key) for key in ("cpu", "gpu", "cuda", "packages", "python")
    }
    result["commit"] = commit()
    # Where a library lies on this machine is nobody's business: `shown` names the kernel.
    del result["spec"]
    for law in result["laws"]:
        law["reason"] = law["reason"].replace(f"{spec}: ", "")
        del law["again"], law["statement"], law["tolerance"]
    return result


def write_page() -> None:
    """docs/laws.md from every file of results."""
    runs: list[dict[str, Any]] = []
    for path in sorted(RESULTS.glob("laws-*.json")):
        runs += json.loads(path.read_text())
    kept = PAGE.read_text().split(BY_HAND, 1)[1] if PAGE.is_file() and BY_HAND in PAGE.read_text() else "\n"
    parts = [HEAD, *table(runs), "", "## The laws", "", *statements(), "", *failures(runs), *missing(runs)]
    PAGE.write_text("\n".join(parts).rstrip() + f"\n\n{BY_HAND}{kept}")


def called(run: dict[str, Any]) -> str:
    return f"`{run['shown']}`" + (" (GPU)" if run["device"] != "cpu" else "")


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Laws by kernels: `holds` with its tightest margin, `BROKEN`, or nothing where it does not apply."""
    lines = ["| law | " + " | ".join(called(run) for run in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    by_name = [{law["name"]: law for law in run["laws"]} for run in runs]
    for name in LAWS:
        cells = [cell(laws.get(name)) for laws in by_name]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "A number is the tightest margin seen, in units of the tolerance; =: every bit; -: not applicable;"
        " nothing: the law came after that run.",
    ]
    for run in runs:
        e = run["environment"]
        most = max((law["examples"] for law in run["laws"]), default=0)
        lines.append(
            f"- {called(run)}: {most} examples a law, on {e.get('gpu') or e.get('cpu')},"
            f" torch {e['packages']['torch']}"
        )
    return lines


def cell(law: dict[str, Any] | None) -> str:
    if law is None:
        return ""
    if law["state"] == "not applicable":
        return "-"
    if law["state"] == "broken":
        return "**BROKEN**"
    return "=" if law["margin"] == 0 else f"{law['margin']:.2g}"


def statements() -> list[str]:
    lines = ["| law | group | statement | tolerance | needs |", "|---|---|---|---|---|"]
    for law in LAWS.values():
        needs = ", ".join(law.needs) or "-"
        cells = (law.name, law.group, law.statement, law.tolerance, needs)
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
    return lines


def failures(runs: list[dict[str, Any]]) -> list[str]:
    lines = ["## What broke", ""]
    for run in runs:
        for law in run["laws"]:
            if law["state"] == "broken":
                lines += [
                    f"- {called(run)}, {law['name']}: {law['reason']}",
                    f"  `verify props {run['shown']} --law {law['name']} --case '{law['case']}'`",
                ]
    return [*(lines if len(lines) > 2 else [*lines, "Nothing."]), ""]


def missing(runs: list[dict[str, Any]]) -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        reasons: dict[str, list[str]] = {}
        for law in run["laws"]:
            if law["state"] == "not applicable":
                reasons.setdefault(law["reason"], []).append(law["name"])
        for reason, names in reasons.items():
            found.setdefault((reason, ", ".join(names)), []).append(called(run))
    lines = ["## What was not applicable, and why", "", "| why | laws | kernels |", "|---|---|---|"]
    return lines + [f"| {reason} | {names} | {', '.join(who)} |" for (reason, names), who in found.items()]


if __name__ == "__main__":
    main()
