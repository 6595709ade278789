"""`verify ppl` in a process of its own, timed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def ppl_run(
    options: Sequence[str], common: argparse.Namespace, folder: Path, kept: Sequence[str]
) -> dict[str, Any]:
    """`kept` keys of the run.json, the command and its seconds; device, chunks and file come from `common`.

    Ends the program where the run left no run.json.
    """
    command = ["ppl", *options, "--device", common.device, "--chunks", str(common.chunks)]
    command += ["-f", common.file] if common.file else []
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "verify", *command, "--out", str(folder)], check=False)
    seconds = time.perf_counter() - started
    if not (folder / "run.json").is_file():
        sys.exit(f"verify {' '.join(command)} ended with {done.returncode} and left no run.json")
    run: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return {"seconds": seconds, "command": command, **{key: run[key] for key in kept}}
