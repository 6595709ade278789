"""Threads that wait sleep. The libraries read that when they start: processes are asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.problems import problem
from verify.kernels.errors import KernelFailure
from verify.kernels.registry import build_kernel
from verify.kernels.waiting import WAITING_VARIABLES, waiting_variables

SAYS = """
import os
def f(q, k, v, *, kv_len, scale):
    raise ValueError(os.environ.get("OMP_WAIT_POLICY"))
"""
COMPUTES = """
from verify.machine.environment import prepare_variables
prepare_variables()
import torch
torch.ones(9).sum()
"""


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_decides_is_left_alone(name: str) -> None:
    assert waiting_variables({"HOME": "/"}) == WAITING_VARIABLES
    assert waiting_variables({name: "5"}) == {"OPENBLAS_THREAD_TIMEOUT": "4"}
    assert waiting_variables({"OPENBLAS_THREAD_TIMEOUT": "9"}) == {"OMP_WAIT_POLICY": "PASSIVE"}


def test_the_library_that_torch_computes_with_spins_no_turn() -> None:
    kept = {name: value for name, value in os.environ.items() if name not in WAITING_VARIABLES}
    shown = kept | {"OMP_DISPLAY_ENV": "verbose"}
    command = [sys.executable, "-c", COMPUTES]
    done = subprocess.run(command, env=shown, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch computes with another OpenMP here")
    assert "GOMP_SPINCOUNT = '0'" in done.stderr


def test_the_process_of_a_foreign_kernel_has_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAITING_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "says.py").write_text(SAYS)
    kernel = build_kernel(f"py:{tmp_path / 'says.py'}::f")
    with pytest.raises(KernelFailure, match="PASSIVE"):
        kernel.run(problem())
    kernel.close()
