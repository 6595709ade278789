"""How far kernels are from exact attention on a model, free-running and with casts frozen.

    python benchmarks/distances.py -f wiki.test.raw --device cpu --chunks 2
    python benchmarks/distances.py -f wiki.test.raw --device cuda --chunks 64
        [--out benchmarks/results/distances.json] [--page docs/evidence.md]

SmolLM2-135M at 512 tokens a window, baseline `flash`, and a candidate for each thing a kernel may do
otherwise. One run of `verify ppl`; its figures are written as JSON, and the table of all runs into the page,
between its marks. On two CPU cores 2 windows take about 2 minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from pages import between_marks, ratio_text
from timed_runs import device_of, keep_run, ppl_run

CANDIDATES = (
    "flash:p=f32", "flash:heads=2+1,kv=4", "flash:acc=f16", "flash:p=bf16", "flash:cache=q8_0",
    "flash:cache=q4_0",
)  # fmt: skip
COLUMNS = (
    "device, scored tokens", "kernel", "free-running", "casts frozen", "distance ratio (99.9 %)",
    "the same, free-running", "ln PPL difference, free-running", "cost in nats, casts frozen", "verdict",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
KEPT = ("verdict", "reasons", "notes", "arms", "pairs", "environment", "speed")


def lines_of(run: dict[str, Any]) -> list[str]:
    """The run's lines: the floor arm, the baseline, and the candidates from near to far."""
    arms = {arm["name"]: arm for arm in run["arms"]}
    pairs = {pair["candidate"]: pair for pair in run["pairs"]}
    where = f"{device_of(run)}, {arms['baseline']['tokens']}"
    ordered = [arms["floor"], *(arm for arm in arms.values() if arm["role"] in ("baseline", "candidate"))]
    ordered.sort(key=lambda arm: arm["frozen"]["kld_to_exact_mean"])
    lines = []
    for arm in ordered:
        klds = f"{arm['kld_to_exact_mean']:.1e} | {arm['frozen']['kld_to_exact_mean']:.1e}"
        pair = pairs.get(arm["name"])
        if pair is None:
            rest = "1 | 1 | | | " if arm["role"] == "baseline" else " | | | | "
        else:
            frozen, free = (
                ratio_text(one.get("distance_ratio"), one.get("distance_ratio_ci"), unknown="")
                for one in (pair, pair["free"] or {})
            )
            rest = (
                f"{frozen} | {free}"
                f" | {pair['dlnppl']:+.1e} +/- {pair['dlnppl_se']:.0e}"
                f" | {pair['cost_nats']:+.1e} +/- {pair['cost_nats_se']:.0e} | {pair['verdict']}"
            )
        name = "exact * (1 + 2^-24 noise)" if arm["role"] == "floor" else f"`{arm['spec']}`"
        lines.append(f"| {where} | {name} | {klds} | {rest} |")
        where = ""
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-f", "--file", help="text; default: that of verify ppl")
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/distances.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/evidence.md"))
    arguments = parser.parse_args()
    options = ["-c", "512", "--measured-windows", "0"]
    for spec in CANDIDATES:
        options += ["--candidate", spec]
    with tempfile.TemporaryDirectory() as work:
        run = ppl_run(options, arguments, Path(work) / "run", KEPT)
    found = keep_run(arguments.out, run, lambda old: old["environment"]["device"])
    table = "\n".join([HEADER, *(line for old in found for line in lines_of(old))])
    arguments.page.write_text(between_marks(arguments.page.read_text(), table))
    print(table)


if __name__ == "__main__":
    main()
