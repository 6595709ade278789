"""Freed memory is kept: a process of its own counts the pages that it is given."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNTS = """
import resource
from verify.machine.heap import keep_freed_memory
kept = {keep} and keep_freed_memory()
first = None
for _ in range(20):
    blocks = [b"x" * (1 << 20) for _ in range(8)]
    del blocks
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    first = faults if first is None else first
print(kept, faults - first)
"""


def pages_of_the_repeats(keep: bool) -> tuple[bool, int]:
    command = [sys.executable, "-c", COUNTS.format(keep=keep)]
    kept, pages = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return kept == "True", int(pages)


def test_pages_are_made_once() -> None:
    kept, pages = pages_of_the_repeats(True)
    if not kept:
        pytest.skip("another C library than glibc")
    _, otherwise = pages_of_the_repeats(False)
    # The first blocks are 8 MiB: 2,048 pages of 4 KiB, or fewer larger ones.
    assert pages < otherwise / 4
