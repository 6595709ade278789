"""The loops of our pages for `git bisect run`, run as they stand there with a stub for verify."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What git bisect makes of a code: 0 good, 1 to 124 and 126, 127 bad, 125 skipped, from 128 on it stops.
THROUGH = {0, 1, *range(129, 160)}


def loops() -> list[str]:
    found = []
    for page in ("README.md", "docs/commands.md", "docs/working-with-engines.md"):
        text = (ROOT / page).read_text()
        found += re.findall(r"git bisect run (sh -c '(?:[^'])*')", text)
    return found


def test_all_loops_are_found() -> None:
    assert len(loops()) >= 3


@pytest.mark.parametrize("number", range(len(loops())))
def test_codes_that_are_no_verdict_are_skipped_and_signals_stop_it(tmp_path: Path, number: int) -> None:
    for name, body in (("verify", "exit $STUB"), ("cmake", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for code in (0, 1, 2, 3, 4, 124, 126, 127, 128, *range(129, 160), 160, 255):
        done = subprocess.run(
            ["sh", "-c", loops()[number]], env={**environment, "STUB": str(code)}, check=False
        )
        assert done.returncode == (code if code in THROUGH else 125), code
