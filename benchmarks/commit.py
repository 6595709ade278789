"""What a file of results holds beside its figures, and how it is written.

Which source was measured (git's HEAD, or the variable COMMIT where the sources lie without their git), where,
and by which command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
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


def write_result(result: Mapping[str, Any], out: Path | None) -> None:
    """Prints a result, and writes it where a file is given."""
    text = json.dumps(result, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
