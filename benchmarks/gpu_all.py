"""Every measurement that is due on a GPU, by name or all, in twelve minutes; the tests where they are named.

    python benchmarks/gpu_all.py [NAME ...] --out FILE.json [-f wiki.test.raw] [--ggml libggml.so]
    python benchmarks/gpu_all.py tests --workers 11 --out FILE.json
    python benchmarks/gpu_all.py --list

One after the other, each in a process of its own with a limit: what is timed runs alone. The file is written
anew after each, with its exit code, its seconds, the end of what it said, and the result that it wrote. A
line whose text or library is not given is left out, and the file says so. The tests take ten minutes by
themselves and are a line of their own: they run where they are asked for by name, and say the name of each.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from commit import commit

HERE = Path(__file__).parent
# Seconds of all together that run where none is named.
ALL = 720
TAIL = 4000


class Line(NamedTuple):
    """One thing that is measured. In `words`, {out}, {text}, {ggml} and {workers} stand for what is given."""

    name: str
    limit_s: int
    words: tuple[str, ...]
    shows: str  # what it is for, in a few words
    by_name: bool = False  # runs only where it is named


def _script(name: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, str(HERE / f"{name}.py"), *words)


LINES = (
    Line(
        "decode",
        55,
        _script("decode", "--only", "glm,splits", "--seconds", "45", "--out", "{out}"),
        "decode against cuDNN and FlashAttention, and what splits cost",
    ),
    Line(
        "calls",
        75,
        _script("calls_gpu", "--seconds", "60", "--out", "{out}"),
        "pages, several tokens, batches",
    ),
    Line(
        "prefill",
        75,
        _script("prefill", "--seconds", "60", "--out", "{out}"),
        "the path prefill against cuDNN and FlashAttention",
    ),
    Line(
        "windows",
        45,
        _script("windows", "--seconds", "30", "--out", "{out}"),
        "whole windows on the path decode",
    ),
    Line(
        "caches",
        70,
        _script("quantised", "--seconds", "40", "--sweep-seconds", "15", "--out", "{out}"),
        "readers of quantised caches",
    ),
    Line(
        "ppl",
        180,
        _script("ppl_cuda", "-f", "{text}", "-c", "512", "8192", "--out", "{out}"),
        "a whole text, by stages",
    ),
    Line("check", 60, _script("check_time", "--device", "cuda", "--out", "{out}"), "check_attention"),
    Line(
        "oracle",
        75,
        _script("sliced_oracle", "--device", "cuda", "--seconds", "50", "--out", "{out}"),
        "exact attention in float64 and in int8 slices",
    ),
    Line(
        "engines",
        60,
        _script(
            "right_kernels", "--device", "cuda", "--again", "--only", "ggml-cuda", "--commands", "diff",
            "--ggml", "ggml-cuda={ggml},backend=cuda", "--out", "{out}",
        ),
        "a built library of llama.cpp",
    ),
    Line(
        "tests",
        660,
        (
            sys.executable, "-m", "pytest", "-m", "cuda", "-v", "-n", "{workers}", "-p", "no:cacheprovider",
            "--tb=short", "--durations=8", str(HERE.parent / "tests"),
        ),
        "the tests that need a GPU",
        by_name=True,
    ),
)  # fmt: skip


def run_line(line: Line, given: dict[str, str], out: Path) -> dict[str, Any]:
    """What came of it: code 124 where it ran past its limit; it and what it started are ended then."""
    command = [word.format(out=out, **given) for word in line.words]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        # The benchmarks' own modules are found beside them, ours from any folder.
        path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        try:
            code = process.wait(line.limit_s)
        except subprocess.TimeoutExpired:
            code = 124
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        text = said.read().decode(errors="replace")
    return {
        "name": line.name,
        "command": command,
        "code": code,
        "wall_s": round(time.perf_counter() - started, 2),
        "said": text[-TAIL:],
        "result": _result(out),
    }


def _result(out: Path) -> Any:
    try:
        return json.loads(out.read_text())
    except (OSError, ValueError):
        return None


def lacks(line: Line, given: dict[str, str]) -> str:
    """Which of {text} and {ggml} it needs and was not given; nothing where it can run."""
    needed = [name for name in ("text", "ggml") if any(f"{{{name}}}" in word for word in line.words)]
    return ", ".join(name for name in needed if not given.get(name))


def run_all(lines: Sequence[Line], given: dict[str, str], out: Path) -> list[dict[str, Any]]:
    """Run them in turn; `out` holds what is done after each."""
    head = {"command": " ".join(["python", *sys.argv]), "commit": commit()}
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for line in lines:
            if missing := lacks(line, given):
                done.append({"name": line.name, "left_out": f"not given: {missing}"})
            else:
                done.append(run_line(line, given, Path(work) / f"{line.name}.json"))
            part = out.with_suffix(".part")
            part.write_text(json.dumps(head | {"lines": done}, indent=1) + "\n")
            part.replace(out)
            ended = done[-1].get("left_out") or f"exit {done[-1]['code']} in {done[-1]['wall_s']} s"
            print(f"{line.name}: {ended}", flush=True)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(line.name for line in LINES))
    parser.add_argument("--out", type=Path, default=Path("gpu-all.json"))
    parser.add_argument("-f", "--file", default="", help="text of whole runs")
    parser.add_argument("--ggml", default="", help="a built libggml.so with its CUDA backend")
    parser.add_argument("--workers", type=int, default=8, help="processes that share the tests")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    known = parser.parse_args()
    unknown = set(known.names) - {line.name for line in LINES}
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(line.name for line in LINES)}")
    chosen = [line for line in LINES if line.name in known.names or not (known.names or line.by_name)]
    if known.list:
        for line in chosen if known.names else LINES:
            print(f"{line.name:8} {line.limit_s:4} s  {line.shows}{', by name alone' * line.by_name}")
        print(f"{sum(line.limit_s for line in chosen)} s at most")
        return 0
    given = {"text": known.file, "ggml": known.ggml, "workers": str(known.workers)}
    done = run_all(chosen, given, known.out)
    return 1 if any(one.get("code") for one in done) else 0


if __name__ == "__main__":
    sys.exit(main())
