"""What `verify identify` says of the kernels at hand: stored, and a table in docs/identify.md.

    python benchmarks/identify_table.py [--device cpu|cuda] [--only "NAME;..."] [--ggml NAME=LIBRARY ...]
        [--seconds 20] [--out benchmarks/results/identify.json] [--page docs/identify.md]

Every kernel is read in a process of its own, and written down as soon as that ends. `--page` alone writes the
page from the file; with other options it comes after the readings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from commit import commit
from pages import between_marks

ROOT = Path(__file__).parents[1]
OURS = ("eager", "eager:acc=f16,kv=4", "eager:p=bf16,out=bf16,block=32")
SPECS = {
    "cpu": (*OURS, "sdpa:math", "sdpa:flash", "flex"),
    "cuda": (
        "flash", "flash:kv=auto", "flash:heads=split,kv=4", "flash:p=f32", "flash:p=bf16", "flash:acc=f16",
        "flash:out=f16", "sdpa:flash", "sdpa:cudnn", "sdpa:efficient", "sdpa:math", "flex", "flashinfer",
    ),
}  # fmt: skip
# Builds of ggml that wheels carry: distribution, and its file.
WHEELS = {"pywhispercpp": "libggml.so", "xllamacpp": "xllamacpp/xllamacpp.abi3.so"}
LIMIT_S = 1800


def of_wheels() -> dict[str, str]:
    """Specifications of the builds that are installed, by name."""
    found = {}
    for distribution, file in WHEELS.items():
        try:
            library = Path(str(metadata.distribution(distribution).locate_file(file)))
        except metadata.PackageNotFoundError:
            continue
        found[f"ggml CPU ({distribution} {metadata.version(distribution)})"] = f"ggml:lib={library}"
    return found


def read(spec: str, device: str, shape: str, seconds: float) -> dict[str, Any]:
    """The JSON of `verify identify`, or what it ended with."""
    command = [sys.executable, "-m", "verify", "identify", spec, "--json", "--device", device]
    command += ["--shape", shape, "--seconds", str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"regimes": [], "reasons": [f"did not end in {LIMIT_S} s"], "not_looked_at": []}
    if done.stdout.strip():
        found: dict[str, Any] = json.loads(done.stdout)
        return found
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    return {"regimes": [], "reasons": [last], "not_looked_at": []}


def table(stored: dict[str, Any]) -> str:
    """A row a regime; calls of other query tokens in which the same is seen share one."""
    lines = ["| kernel | device, heads | query tokens | n_kv | what is seen |", "|---|---|---|---|---|"]
    for device, kernels in sorted(stored.items()):
        for name, one in kernels.items():
            query_tokens: dict[tuple[str, str], list[str]] = {}
            for each in one["regimes"]:
                span = f"{each['n_kv_min']} to {each['n_kv_max']}"
                query_tokens.setdefault((span, each["said"]), []).append(str(each["n_q_min"]))
            for (span, said), n_q in query_tokens.items():
                cells = (f"`{name}`", f"{device}, {one['shape']}", ", ".join(n_q), span, said)
                lines.append("| " + " | ".join(cells) + " |")
            if not one["regimes"]:
                why = "; ".join(one["reasons"])
                lines.append(f"| `{name}` | {device}, {one['shape']} | | | not read: {why} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="")
    parser.add_argument("--ggml", action="append", default=[], metavar="NAME=LIBRARY")
    parser.add_argument("--shape", default="8/2x64")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/identify.json")
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args(arguments)
    stored: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out.exists() else {}
    if asked.device is not None:
        specs = {spec: spec for spec in SPECS[asked.device]}
        specs |= of_wheels() if asked.device == "cpu" else {}
        backend = ",backend=cuda" if asked.device == "cuda" else ""
        for each in asked.ggml:
            name, _, library = each.partition("=")
            specs[name] = f"ggml:lib={library}{backend}"
        chosen = asked.only.split(";") if asked.only else list(specs)
        for name in chosen:
            print(name, file=sys.stderr, flush=True)
            one = read(specs[name], asked.device, asked.shape, asked.seconds)
            kept = {key: one[key] for key in ("regimes", "reasons", "not_looked_at")}
            kept |= {"shape": asked.shape, "commit": commit(), "seconds": one.get("seconds")}
            stored.setdefault(asked.device, {})[name] = kept
            asked.out.write_text(json.dumps(stored, indent=1) + "\n")
    if asked.page is not None:
        asked.page.write_text(between_marks(asked.page.read_text(), table(stored)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
