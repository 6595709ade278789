"""What a file of results holds beside its figures, and how it is written.

Which source was measured (git's HEAD, or the variable COMMIT where the sources lie without their git), where,
and by which command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def commit() -> str:
    """A short hash, "-dirty" behind it where the working tree has other contents; or "unknown"."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def gpu_run(shape: object) -> dict[str, str]:
    """What a file of results says of the run on a GPU that made it."""
    import torch
    import triton

    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": str(shape),
    }


def measure_lines(
    result: dict[str, Any],
    measured: Iterable[Callable[[], Sequence[Mapping[str, Any]]]],
    *,
    seconds: float,
    out: Path | None,
) -> None:
    """Adds to `lines` of a result, and prints, what each of them measures; begins none once the seconds are
    over. The file is written after each: what was measured is kept, whatever the next one does."""
    begun = time.time()
    for measure in measured:
        if time.time() - begun > seconds:
            result["stopped"] = f"after {seconds:g} s"
            break
        for line in measure():
            result["lines"].append(line)
            print(json.dumps(line), flush=True)
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n")


def write_result(result: Mapping[str, Any], out: Path | None) -> None:
    """Prints a result, and writes it where a file is given."""
    text = json.dumps(result, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
