"""A command of `verify` in a process of its own, timed; and what a page keeps of several such runs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

from commit import commit


def verify_run(command: Sequence[str], folder: Path, kept: Sequence[str]) -> dict[str, Any]:
    """`kept` keys of the run.json, the command, its seconds and the commit.

    Ends the program where the run left no run.json.
    """
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "verify", *command, "--out", str(folder)], check=False)
    seconds = time.perf_counter() - started
    if not (folder / "run.json").is_file():
        sys.exit(f"verify {' '.join(command)} ended with {done.returncode} and left no run.json")
    run: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return {
        "seconds": seconds,
        # Where files lie on this machine is nobody's business.
        "command": [Path(word).name if word.startswith("/") else word for word in command],
        "commit": commit(),
        **{key: run[key] for key in kept},
    }


def ppl_run(
    options: Sequence[str], common: argparse.Namespace, folder: Path, kept: Sequence[str]
) -> dict[str, Any]:
    """`verify ppl`; device, chunks and file come from `common`."""
    command = ["ppl", *options, "--device", common.device, "--chunks", str(common.chunks)]
    command += ["-f", common.file] if common.file else []
    return verify_run(command, folder, kept)


def keep_run(
    path: Path, run: dict[str, Any], key: Callable[[dict[str, Any]], Hashable]
) -> list[dict[str, Any]]:
    """All runs in `path`, sorted, this one in the place of an older one with the same key.

    So a page shows a CPU's and a GPU's side by side, and each is written as soon as it is there.
    """
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    found = sorted([*(old for old in found if key(old) != key(run)), run], key=lambda r: str(key(r)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def device_of(run: dict[str, Any]) -> str:
    """The GPU's name, or `cpu`."""
    return str(run["environment"].get("gpu") or run["environment"]["device"])
