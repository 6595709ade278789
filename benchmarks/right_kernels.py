"""Right kernels through `verify ppl`, `diff`, `props` and `gen`: what is said of each; none is broken.

    python benchmarks/right_kernels.py [--device cpu|cuda] [--only NAME,...] [--commands ppl,diff,props,gen]
        [--ggml NAME=LIBRARY ...] [--workers N] [--together N] [--again]
        [--out benchmarks/results/right-kernels.json] [--take FILE.json ...] [--page docs/right-kernels.md]

Every run is a process of its own, written down as soon as it ends; what is there from the same device is
not run again (`--again` does). `--together N` asks N kernels of one baseline in one run, which shares what
does not depend on them. The rows that `diff` judged by lie beside the file (`-strata.npz`), and are judged
again by the rules of the day in the fast tests. `--take` runs nothing: what this script wrote on another
machine stands in the place of older runs of the same kernels. `--page` writes the page from the file, after
`--take` where both are given, and runs nothing either. A run that is `broken` or ends without a verdict makes
the exit code 1, but where the table says for what limit it truly is.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from commit import commit
from pages import between_marks

from verify.diff.stored_strata import STRATA, StoredPair, packed, unpacked

ROOT = Path(__file__).parents[1]
# What diffs judged by, by `pair_name`.
Pairs = dict[str, StoredPair]
OWN = "tests/support/right_kernels.py"
COMMANDS = ("ppl", "diff", "props", "gen")
# Small, and yet every detector has something to look at.
OPTIONS = {
    "ppl": ["-c", "256", "--chunks", "4"],
    "diff": ["--shape", "smollm2", "--n-kv", "512,2048"],
    "props": ["--examples", "10", "--seed", "1"],
    "gen": ["-p", "The history of the city begins with", "-n", "16"],
}
# On a CPU what still decides.
ON_CPU = {
    **OPTIONS,
    "ppl": ["-c", "128", "--chunks", "2"],
    "diff": ["--shape", "4/2x64", "--n-kv", "300,1101"],
    "props": ["--examples", "6", "--seed", "1"],
    "gen": ["-p", "The history of the city begins with", "-n", "12"],
}


class RightKernel(NamedTuple):
    """A kernel that only rounds: how it is named here, its specification, what it does, and where it ends."""

    name: str
    spec: str
    what: str
    # Why a run of it may truly be `broken`: a limit of its own arithmetic, or empty.
    limit: str = ""
    # What it is compared with; the default answers in the candidate's type.
    baseline: str = "flash"


_OVERFLOWS = "float16 sums overflow where inputs near the largest float16 add up"


def py(name: str, what: str, *, limit: str = "", arithmetic: str = "acc=f32") -> RightKernel:
    """One of our own writing, in the file beside the tests."""
    spec = f"py:{OWN}::{name}" + (f",{arithmetic}" if arithmetic else "")
    return RightKernel(name, spec, what, limit)


KERNELS = (
    RightKernel("flash-split", "flash:heads=split,kv=4", "ours, split"),
    RightKernel("flash-kv8", "flash:kv=8", "ours, eight parts"),
    RightKernel("flash-auto", "flash:kv=auto", "ours, parts by the device"),
    RightKernel("flash-block", "flash:block=128", "ours, larger tiles"),
    RightKernel("flash-p-f32", "flash:p=f32", "ours, P in float32"),
    RightKernel("flash-p-bf16", "flash:p=bf16", "ours, P in bfloat16"),
    RightKernel("flash-acc-f16", "flash:acc=f16", "ours, float16 sums", _OVERFLOWS),
    RightKernel("flash-out-f16", "flash:out=f16", "ours, float16 result", baseline="flash:out=f32"),
    RightKernel("flash-out-bf16", "flash:out=bf16", "ours, bfloat16 result", baseline="flash:out=f32"),
    RightKernel("flash-q8_0", "flash:cache=q8_0", "ours, q8_0 cache"),
    RightKernel("flash-q4_0", "flash:cache=q4_0", "ours, q4_0 cache"),
    RightKernel("sdpa-math", "sdpa:math", "torch's operator, by products"),
    RightKernel("sdpa-flash", "sdpa:flash", "torch's operator, flash"),
    RightKernel("sdpa-efficient", "sdpa:efficient", "torch's operator, memory-efficient"),
    RightKernel("sdpa-cudnn", "sdpa:cudnn", "torch's operator, cuDNN"),
    RightKernel("flex", "flex", "torch's FlexAttention"),
    py("textbook", "tiled online softmax, float32 result"),
    py("textbook_f16", "the same, float16 result"),
    py("textbook_bf16", "the same, bfloat16 result"),
    py("float32_p", "P in float32"),
    py("bf16_p", "P in bfloat16", arithmetic="acc=f32,p=bf16"),
    py("small_tiles", "tiles of 16 keys"),
    py("large_tiles", "tiles of 256 keys"),
    py("sequence_of_parts", "seven parts, merged one after another"),
    py("tree_of_parts", "seven parts, merged in a tree"),
    py("parts_in_any_order", "seven parts, merged in another order each time"),
    py("sums_rounded_p", "the denominator adds the rounded P"),
    py("half_query", "the scaled query in float16"),
    py("half_query_half_result", "the same, float16 result"),
    py("float16_sums", "float16 accumulators", limit=_OVERFLOWS, arithmetic=""),
    py("float16_sums_in_parts", "the same in eight parts", limit=_OVERFLOWS, arithmetic=""),
    py("ggml_offset", "llama.cpp's offset on the maximum, float32 sums"),
    py(
        "ggml_offset_float16_sums",
        "llama.cpp's offset on the maximum, float16 sums",
        limit=_OVERFLOWS,
        arithmetic="",
    ),
    py("three_nats_offset", "three nats on the maximum"),
    py("lazy_rescale", "FlashAttention 4's conditional rescale, float16 result"),
    py("lazy_rescale_f32", "the same, float32 result"),
    py("exp2", "exponentials by powers of two"),
    py("cubic_exponential", "exponentials by a cubic, 9e-5 off"),
    py("plain", "no tiles, no lse, nothing stated", arithmetic=""),
    py("in_float64", "the formula in float64", arithmetic=""),
    py("sdpa", "torch's operator behind a function, nothing stated", arithmetic=""),
)


def run(
    command: str, kernels: Sequence[RightKernel], device: str, file: str | None
) -> tuple[list[dict[str, Any]], list[tuple[str, StoredPair]]]:
    """One command on some kernels of one baseline, `props` on one: the verdict, reasons and exit code of
    each, and the rows that a diff judged by."""
    argv = [command, *(ON_CPU if device == "cpu" else OPTIONS)[command], "--device", device, "--json"]
    argv += ["-f", file] if file and command == "ppl" else []
    specs = [kernel.spec for kernel in kernels]
    candidates = [word for spec in specs for word in ("--candidate", spec)]
    argv += specs if command == "props" else ["--baseline", kernels[0].baseline, *candidates]
    started = time.perf_counter()
    stored: list[tuple[str, StoredPair]] = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        done = subprocess.run(
            [sys.executable, "-m", "verify", *argv, *([] if command == "props" else ["--out", str(out)])],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
        if (out / STRATA).is_file():
            names = {kernel.spec: pair_name(kernel.name, device) for kernel in kernels}
            kept = unpacked(out / STRATA)
            stored = [(names[spec], pair._replace(spec=shown(spec))) for spec, pair in kept]
    base = {
        "command": command,
        "device": device,
        "argv": [shown(word) for word in argv],
        "exit_code": done.returncode,
        "seconds": round((time.perf_counter() - started) / len(kernels), 1),
        "commit": commit(),
    }
    try:
        report = json.loads(done.stdout)
    except ValueError:
        if len(kernels) > 1:
            # One that cannot run here is not the others' doing.
            alone = [run(command, [kernel], device, file) for kernel in kernels]
            return [row for rows, _ in alone for row in rows], [pair for _, kept in alone for pair in kept]
        last = done.stderr.strip().splitlines()
        verdict = "refused" if done.returncode == 2 else "none"
        said = {"verdict": verdict, "reasons": last[-1:]}
        return [{"name": k.name, "spec": shown(k.spec), **base, **said} for k in kernels], []
    if command == "props":
        (kernel,) = kernels
        broken = [law for law in report["laws"] if law["state"] == "broken"]
        holds = sum(law["state"] == "holds" for law in report["laws"])
        reasons = [f"{law['name']}: {law['reason']}" for law in broken] or [f"{holds} laws hold"]
        verdict = "broken" if broken else "holds"
        return [
            {"name": kernel.name, "spec": kernel.spec, **base, "verdict": verdict, "reasons": reasons}
        ], []
    environment = report.get("environment", {})
    return [
        {
            "name": kernel.name,
            "spec": shown(kernel.spec),
            **base,
            "verdict": pair["verdict"],
            "reasons": pair["reasons"],
            "distance_ratio": pair.get("distance_ratio"),
            "environment": {"torch": environment.get("torch"), "packages": environment.get("packages")},
        }
        for kernel, pair in zip(kernels, report["pairs"], strict=True)
    ], stored


def pair_name(name: str, device: str) -> str:
    """By which the rows are kept that a diff judged by."""
    return f"{name} {device}"


def shown(word: str) -> str:
    """A word of a command, a file by its name: where it lies on this machine is nobody's business."""
    return re.sub(r"(^|lib=)/\S*/", r"\1", word)


def together(kernels: Sequence[RightKernel], most: int) -> list[list[RightKernel]]:
    """Runs of at most so many kernels, each of one baseline."""
    of_baseline: dict[str, list[RightKernel]] = {}
    for kernel in kernels:
        of_baseline.setdefault(kernel.baseline, []).append(kernel)
    return [some[i : i + most] for some in of_baseline.values() for i in range(0, len(some), most)]


def strata_file(results: Path) -> Path:
    """Where the rows that diffs judged by lie, beside the results."""
    return results.with_name(f"{results.stem}-strata.npz")


Row = dict[str, Any]


def key_of(row: Row) -> tuple[str, str, str]:
    """What there is one run of: kernel, command and device."""
    return row["name"], row["command"], row["device"]


def put(rows: Sequence[Row], row: Row) -> list[Row]:
    """The rows with this one in the place of an older one."""
    kept = [each for each in rows if key_of(each) != key_of(row)]
    return sorted([*kept, row], key=lambda each: (each["device"], each["name"], each["command"]))


def take(file: Path, rows: Sequence[Row], pairs: Pairs) -> tuple[list[Row], Pairs]:
    """Rows and pairs with the runs of another results file, and what their diffs judged by.

    A run that was refused there, or ended without a verdict, is none: that machine lacked something. Where a
    diff is taken without its rows those that were there are dropped: they are of another run.
    """
    runs = [run for run in json.loads(file.read_text()) if run["verdict"] not in ("refused", "none")]
    strata = strata_file(file)
    its = dict(unpacked(strata)) if strata.is_file() else {}
    kept, stored = list(rows), dict(pairs)
    for run in runs:
        kept = put(kept, run)
        if run["command"] == "diff":
            name = pair_name(run["name"], run["device"])
            stored.pop(name, None)
            stored |= {name: its[name]} if name in its else {}
    return kept, stored


def false_alarm(row: dict[str, Any], limits: dict[str, str]) -> bool:
    """Whether a run says of a right kernel what is not so."""
    if row["verdict"] == "none":
        return True
    return row["verdict"] == "broken" and not limits.get(row["name"])


def table(rows: list[dict[str, Any]], device: str) -> str:
    """Markdown: a kernel a line, a command a column."""
    said = {(row["name"], row["command"]): row for row in rows if row["device"] == device}
    lines = ["| kernel | what it does | " + " | ".join(COMMANDS) + " |", "|---" * (2 + len(COMMANDS)) + "|"]
    names = [*KERNELS, *(RightKernel(n, n, "a built engine") for n in _others(rows, device))]
    for kernel in names:
        cells = [said[kernel.name, c]["verdict"] if (kernel.name, c) in said else "-" for c in COMMANDS]
        if set(cells) != {"-"}:
            limit = f" ({kernel.limit})" if kernel.limit and "broken" in cells else ""
            lines.append(f"| `{kernel.name}` | {kernel.what}{limit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _others(rows: list[dict[str, Any]], device: str) -> list[str]:
    known = {kernel.name for kernel in KERNELS}
    return sorted({row["name"] for row in rows if row["device"] == device} - known)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="")
    parser.add_argument("--commands", default=",".join(COMMANDS))
    parser.add_argument("--ggml", action="append", default=[], help="NAME=LIBRARY[,option=value...]")
    parser.add_argument("-f", "--file")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--together", type=int, default=1, help="kernels a run")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/right-kernels.json")
    parser.add_argument("--take", type=Path, action="append", default=[], help="results of another machine")
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    rows: list[Row] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else []
    strata = strata_file(arguments.out)
    pairs = dict(unpacked(strata)) if strata.is_file() else {}
    for file in arguments.take:
        rows, pairs = take(file, rows, pairs)
    if arguments.take:
        strata.write_bytes(packed(sorted(pairs.items()), digits=8))
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.page is None and not arguments.take:
        built = [RightKernel(n, f"ggml:lib={lib}", "a built engine", _OVERFLOWS) for n, _, lib in
                 (word.partition("=") for word in arguments.ggml)]  # fmt: skip
        wanted = [k for k in (*KERNELS, *built) if not arguments.only or k.name in arguments.only.split(",")]
        there = {key_of(row) for row in rows}
        due = [
            (command, some)
            for command in arguments.commands.split(",")
            for some in together(
                [k for k in wanted if arguments.again or (k.name, command, arguments.device) not in there],
                1 if command == "props" else arguments.together,
            )
        ]
        with ThreadPoolExecutor(arguments.workers) as pool:
            running = [pool.submit(run, c, some, arguments.device, arguments.file) for c, some in due]
            for done in as_completed(running):
                found, stored = done.result()
                if stored:
                    pairs |= dict(stored)
                    strata.write_bytes(packed(sorted(pairs.items()), digits=8))
                for row in found:
                    rows = put(rows, row)
                    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
                    reason = row["reasons"][0][:160] if row["reasons"] else ""
                    said = f"{row['name']:26} {row['command']:6} {row['verdict']:13} {row['seconds']:6.1f} s"
                    print(said, reason, flush=True)
    if arguments.page is not None:
        tables = [f"## On {d}\n\n{table(rows, d)}" for d in sorted({row["device"] for row in rows})]
        arguments.page.write_text(between_marks(arguments.page.read_text(), "\n\n".join(tables)))
    limits = {kernel.name: kernel.limit for kernel in KERNELS}
    limits |= {word.partition("=")[0]: _OVERFLOWS for word in arguments.ggml}
    alarms = [row for row in rows if false_alarm(row, limits)]
    for row in alarms:
        where = f"{row['name']} {row['command']} ({row['device']})"
        print(f"false alarm: {where}: {row['verdict']} {row['reasons'][:1]}")
    return 1 if alarms else 0


if __name__ == "__main__":
    raise SystemExit(main())
