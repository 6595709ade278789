"""Which source was measured: git's HEAD, or the variable COMMIT where the sources lie without their git."""

from __future__ import annotations

import os
import subprocess
import sys


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
