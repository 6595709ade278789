"""Running `verify ARGUMENTS` in a test."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import pytest

from support.schemas import assert_as_told
from verify.__main__ import main


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def verify(*arguments: str) -> Done:
    """`verify ARGUMENTS` in this process, which spares loading torch for every test."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        patch.setattr(sys, "argv", ["verify", *arguments])
        main()
    if "--json" in arguments and out.getvalue():
        # Whatever a test asks for: JSON that is printed is as its schema says.
        assert_as_told("ppl-only" if "--only" in arguments else arguments[0], out.getvalue())
    return Done(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def verify_apart(*arguments: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """`verify ARGUMENTS` in a process of its own, ended after `timeout` seconds."""
    command = [sys.executable, "-m", "verify", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)


def assert_refused(done: Done, *said: str) -> None:
    """Exit code 2 and one line on stderr that holds all of `said`."""
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for words in said:
        assert words in lines[0]
