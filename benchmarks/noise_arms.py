"""What a change of plan does by itself: a candidate among noise arms, at several context lengths.

    python benchmarks/noise_arms.py -f wiki.test.raw --device cpu -c 512 --chunks 4
    python benchmarks/noise_arms.py -f wiki.test.raw --device cuda -c 512 2048 8192 --chunks -1
        [--noise 8] [--out benchmarks/results/noise-arms.json] [--page docs/noise.md]

SmolLM2-135M, baseline `flash`, candidate `flash:heads=2+1,kv=4`, and arms with the baseline's arithmetic and
random plans. Each context length is a run of `verify ppl` in a process of its own; the figures are written as
JSON, and the table into the page, between its marks. On two CPU cores 4 windows of 512 take about 4 minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from pages import between_marks
from timed_runs import device_of, keep_run, ppl_run

CANDIDATE = "flash:heads=2+1,kv=4"
COLUMNS = (
    "device", "n_ctx", "scored tokens", "PPL", "noise arms: distance ratios", "limits (99.9 %)", "candidate",
    "place", "ln PPL differences of noise arms", "of the candidate", "verdict",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


KEPT = ("verdict", "reasons", "notes", "arms", "pairs", "noise", "in_place", "environment", "speed")


def noise_run(n_ctx: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One context length: what its run.json says of the noise arms, and seconds."""
    options = ["-c", str(n_ctx), "--noise", str(arguments.noise), "--candidate", CANDIDATE]
    run = ppl_run(options, arguments, folder, KEPT)
    for kernel in run["in_place"]:
        del kernel["layers"]
    return {"n_ctx": n_ctx, **run}


def line_of(run: dict[str, Any]) -> str:
    """The run's line of the table. Distance ratios are exp(theta / 2)."""
    from math import exp

    (pair,), (noise,) = run["pairs"], run["noise"]
    (place,) = noise["candidates"]
    baseline = next(arm for arm in run["arms"] if arm["role"] == "baseline")
    ratios = [arm["distance_ratio"] for arm in noise["arms"]]
    shifts = [arm["dlnppl"] for arm in noise["arms"]]
    low, high = (exp(theta / 2) for theta in noise["theta_limits"])
    where = "outside" if place["outside"] else "inside"
    return (
        f"| {device_of(run)} | {run['n_ctx']} | {pair['tokens']} | {baseline['ppl']:.4f}"
        f" | {min(ratios):.3f} to {max(ratios):.3f} | {low:.3f} to {high:.3f} | {pair['distance_ratio']:.3f}"
        f" | {where}, {place['rank']} of {len(ratios)} closer | {min(shifts):+.1e} to {max(shifts):+.1e}"
        f" | {pair['dlnppl']:+.1e} | {run['verdict']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-f", "--file", help="text; default: that of verify ppl")
    parser.add_argument("-c", "--n-ctx", type=int, nargs="+", default=[512])
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--noise", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/noise-arms.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/noise.md"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        for n_ctx in arguments.n_ctx:
            found = keep_run(arguments.out, noise_run(n_ctx, arguments, Path(work) / str(n_ctx)), _key)
    table = "\n".join([HEADER, *map(line_of, found)])
    arguments.page.write_text(between_marks(arguments.page.read_text(), table))
    print(table)


def _key(run: dict[str, Any]) -> tuple[str, str]:
    return run["environment"]["device"], f"{run['n_ctx']:6}"


if __name__ == "__main__":
    main()
