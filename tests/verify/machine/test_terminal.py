"""What stands in a terminal's place: readers that leave, full disks, narrow screens, control characters."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from support.ppl_runs import Tiny, command
from verify.kernels.said import visible
from verify.machine.terminal import console_on, counted, print_table_on


def started(*arguments: str, stdout: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "verify", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True
    )


def test_a_reader_that_leaves_ends_no_run(tiny: Tiny, tmp_path: Path) -> None:
    with started(*command(tiny, tmp_path / "run", "--chunks", "2"), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, errors = process.communicate(timeout=120)
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert process.returncode == run["exit_code"]
    assert "Traceback" not in errors
    assert "Broken pipe" not in errors


def test_what_cannot_be_printed_is_said() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with Path("/dev/full").open("w") as full, started("list", stdout=full.fileno()) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.startswith("verify: standard output: No space left on device")


@pytest.mark.parametrize("width", [30, 200])
def test_no_figure_of_a_table_is_cut(width: int) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("kernel", overflow="fold")
    for name in ("PPL", "KLD"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("flash:heads=split,kv=4", "22.7434 +/- 2.27470", "5.85e-07 and more")
    screen = io.StringIO()
    console = console_on(screen)
    console.width = width
    print_table_on(console, table)
    shown = screen.getvalue()
    assert "22.7434 +/- 2.27470" in shown
    assert "5.85e-07 and more" in shown
    assert "".join(line[:12].strip() for line in shown.splitlines()[1:]).startswith("flash:heads=")


def test_words() -> None:
    assert [counted(n, "window") for n in (0, 1, 2)] == ["0 windows", "1 window", "2 windows"]
    assert visible("a\x00b\x1b[31m\tc\n\x9b") == "a\\x00b\\x1b[31m\tc\n\\x9b"
