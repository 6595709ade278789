"""Greedy text with several kernels: where it differs, and how far they move the two top tokens.

    python benchmarks/generation.py --device cpu -n 48
    python benchmarks/generation.py --device cuda -n 256 -f wiki.test.raw --prompt-bytes 4000
        [--out benchmarks/results/generation.json] [--page docs/generation.md]

SmolLM2-135M with `verify gen`, baseline `flash`. The prompt is a short sentence, or the first bytes of a
file. The figures are written as JSON, and the table of all runs into the page, between its marks.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from pages import between_marks, ratio_text
from timed_runs import device_of, keep_run, verify_run

CANDIDATES = (
    "flash:heads=split,kv=4", "flash:acc=f16", "flash:p=bf16", "flash:cache=q8_0", "flash:cache=q4_0",
)  # fmt: skip
SENTENCE = "The history of the city begins"
COLUMNS = (
    "device, prompt + text", "candidate", "verdict", "error over the baseline's (99.9 %)", "first difference",
    "steps that differ", "moves the two top tokens by (rms)", "one rounding of noise moves them by",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
KEPT = ("verdict", "reasons", "notes", "prompt", "arms", "pairs", "coverage", "environment", "speed")


def lines_of(run: dict[str, Any]) -> list[str]:
    specs = {arm["name"]: arm["spec"] for arm in run["arms"]}
    where = f"{device_of(run)}, {run['prompt']['tokens']} + {run['pairs'][0]['tokens']} tokens"
    lines = []
    for pair in run["pairs"]:
        ratio = ratio_text(pair["distance_ratio"], pair["distance_ratio_ci"])
        first = pair["first_difference"]
        parted = "none" if first is None else f"token {first['step'] + 1}"
        if first is not None and first["floor"] is not None:
            parted += (
                f": {abs(first['margin']):.2g} nats apart, moved by {abs(first['moved']):.2g},"
                f" rounding alone moves them by {first['floor']:.2g}"
            )
        lines.append(
            f"| {where} | `{specs[pair['candidate']]}` | {pair['verdict']} | {ratio} | {parted}"
            f" | {len(pair['disagreements'])} | {pair['margin_moved_rms']:.2g}"
            f" | {pair['margin_moved_rms_floor']:.2g} |"
        )
        where = ""
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-f", "--file", type=Path, help="text whose beginning is the prompt")
    parser.add_argument("--prompt-bytes", type=int, default=4000, help="of the file")
    parser.add_argument("-n", "--n-predict", type=int, default=48)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/generation.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/generation.md"))
    arguments = parser.parse_args()
    command = ["gen", "-n", str(arguments.n_predict), "--ignore-eos", "--device", arguments.device]
    for spec in CANDIDATES:
        command += ["--candidate", spec]
    with tempfile.TemporaryDirectory() as work:
        prompt = Path(work) / "prompt.txt"
        prompt.write_bytes(
            arguments.file.read_bytes()[: arguments.prompt_bytes] if arguments.file else SENTENCE.encode()
        )
        run = verify_run([*command, "-f", str(prompt)], Path(work) / "run", KEPT)
    found = keep_run(
        arguments.out, run, lambda old: (old["environment"]["device"], f"{old['prompt']['tokens']:6}")
    )
    table = "\n".join([HEADER, *(line for old in found for line in lines_of(old))])
    arguments.page.write_text(between_marks(arguments.page.read_text(), table))
    print(table)


if __name__ == "__main__":
    main()
