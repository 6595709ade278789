"""compute-sanitizer finds no stray access and no race in any kernel of `flash`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda

# Odd sizes, so that every mask matters; each kernel of kernels/flash once. Ends with the names that ran.
SMALL_CASES = """
import torch
from verify.kernels.registry import build_kernel

torch.manual_seed(0)

def attend(spec, path, size, r):
    q, k, v = (torch.randn(2, n, h, size, dtype=torch.float16, device="cuda")
               for n, h in ((3, 2 * r), (131, 2), (131, 2)))
    kv_len = torch.tensor([[0, 65, 131], [1, 64, 130]], dtype=torch.int32, device="cuda")
    more = {"sinks": torch.zeros(2 * r, device="cuda")} if "cache" not in spec else {}
    kernel = build_kernel(spec)
    out = kernel.attend(q, k, v, kv_len=kv_len, scale=0.1, path=path, **more).out
    assert bool(torch.isfinite(out).all()), spec
    assert not kernel.notes, kernel.notes
    print("ran", spec, path)

attend("flash:kv=3", "decode", 128, 12)
attend("flash:heads=2+1,kv=2,launch=each", "decode", 80, 3)
attend("flash:kv=2", "prefill", 64, 3)
attend("flash:kv=2,cache=q8_0", "decode", 128, 3)
attend("flash:kv=2,cache=q4_0", "decode", 64, 3)
attend("flash:kv=2,cache=q8_0,expand=f16", "decode", 64, 3)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_is_clean(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    # Without torch's own memory pool, an access beyond a tensor is an access beyond an allocation.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL_CASES],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    said = (done.stdout + done.stderr)[-3000:]
    assert done.stdout.count("ran flash") == 6, said
    assert (done.returncode == 0 and "0 errors" in said) or "0 hazards" in said, said
