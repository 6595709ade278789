"""The question of ik_llama.cpp's pull request 1183: does its split of 12 heads into 8+4 change the result?

    python benchmarks/question_1183.py -f wiki.test.raw [--chunks 8] [--device cuda]
        [--out benchmarks/results/question-1183.json] [--page docs/question-1183.md]

SmolLM2-135M is dressed as glm4moe with 96 query heads over 8 KV heads of 128 (`python -m
verify.model.dressing`), which computes the same function through the shapes of GLM-4.5. The last 256
positions of windows of 8,192 tokens take the decode path, as text generation does: n_kv is padded to 256, so
the policy splits from 7,937 keys. Once with float16 accumulators, as that engine has them, and once with
float32. Writes the figures as JSON, and the table into the page, between its marks. About 4 minutes on an
H100, one of them for the dressing."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from pages import between_marks, ratio_text
from timed_runs import device_of, ppl_run

from verify.model.dressing.dress import Dress, dress
from verify.model.locate import locate_model

GLM = Dress(to="glm4moe", copies=4, kv_heads=8, live=(0, 4, 7), head_size=128, experts="halves", dtype="f16")
ACCUMULATORS = ("f16", "f32")
HEADER = (
    "| accumulators | scored tokens, rows that ran the split | distance ratio (99.9 %) | KLD to exact, before"
    " and after | ln PPL difference | verdict |\n|---|---|---|---|---|---|"
)


KEPT = ("verdict", "reasons", "notes", "arms", "pairs", "coverage", "in_place", "by_n_kv", "environment")


def compared(model: Path, acc: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One comparison: its run.json, and seconds."""
    baseline, candidate = (f"flash:policy={policy},acc={acc},kv=auto" for policy in ("before", "ik-1183"))
    options = ["-m", str(model), "-c", str(arguments.n_ctx), "--score-last", str(arguments.score_last)]
    options += ["--path", "decode", "--baseline", baseline, "--candidate", candidate]
    return {"acc": acc, **ppl_run(options, arguments, folder, KEPT)}


def line_of(run: dict[str, Any]) -> str:
    """The run's line of the table."""
    (pair,) = run["pairs"]
    ratio = ratio_text(pair["distance_ratio"], pair["distance_ratio_ci"])
    return (
        f"| {run['acc']} | {pair['tokens']}, {pair['coverage_rows']:.1%}"
        f" | {ratio}"
        f" | {pair['frozen_kld_reference']:.2e}, {pair['frozen_kld']:.2e}"
        f" | {pair['dlnppl']:+.1e} +/- {pair['dlnppl_se']:.0e} | **{run['verdict']}** |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-f", "--file", help="text; default: that of verify ppl")
    parser.add_argument("-c", "--n-ctx", type=int, default=8192)
    parser.add_argument("--score-last", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/question-1183.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/question-1183.md"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        started = time.perf_counter()
        model = dress(locate_model(None), Path(work) / "glm4moe.gguf", GLM)
        dressing = time.perf_counter() - started
        runs = [compared(model, acc, arguments, Path(work) / acc) for acc in ACCUMULATORS]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"dressing_seconds": dressing, "runs": runs}, indent=1) + "\n")
    said = [
        f"Measured on {device_of(runs[0])}, {arguments.chunks} windows of {arguments.n_ctx} tokens.",
        "",
        HEADER,
    ]
    table = "\n".join([*said, *map(line_of, runs)])
    arguments.page.write_text(between_marks(arguments.page.read_text(), table))
    print(table)


if __name__ == "__main__":
    main()
