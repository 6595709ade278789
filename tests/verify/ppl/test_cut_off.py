"""A run that is cut off at any moment goes on, and leaves the bytes of one that was not."""

from __future__ import annotations

import io
import itertools
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from rich.progress import Progress

from support import ppl_runs
from support.cli import assert_refused, verify, verify_apart
from support.ppl_runs import Tiny, write_tiny
from verify.machine.errors import UsageError
from verify.machine.exits import EXIT_INTERRUPTED
from verify.model.group import Group
from verify.ppl.checkpoint import Checkpoint, Checkpoints
from verify.ppl.runfolder import RunFolder
from verify.reports import ppl_screen, writing

RESULTS = ("tokens.parquet", "layers.parquet")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"), block_count=2)


def command(tiny: Tiny, out: Path, *more: str) -> list[str]:
    kernels = ["--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2"]
    return ppl_runs.command(tiny, out, *kernels, "--memory", "170K", *more)


def results(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in RESULTS]


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    verify(*command(tiny, whole))
    write, calls = pq.write_table, itertools.count()

    def full(*arguments: Any) -> None:
        if next(calls) > 3:
            raise OSError(28, "No space left on device")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        assert_refused(verify(*command(tiny, out)), "No space left on device", f"--resume {out}")
    kept = [f.name for f in (out / "groups").iterdir()]
    assert "00000" in kept
    assert not list(out.glob("**/*.part"))
    # Groups of another size go on from there.
    verify("ppl", "--resume", str(out), "--memory", "8G")
    assert (out / "tokens.parquet").read_bytes() == (whole / "tokens.parquet").read_bytes()


def test_settings_of_another_command_are_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"command": "diff", "settings": {}, "identity": {}}')
    assert_refused(
        verify("ppl", "--resume", str(tmp_path)), "settings.json", "not that of a run of verify ppl"
    )


def finished(out: Path) -> bool:
    """Whether a run has nothing to go on with; its reports are there then."""
    done = (out / "run.json").is_file() and not (out / "groups").is_dir()
    assert not done or (out / "report.html").is_file()
    return done


def test_a_run_cut_off_before_its_reports_makes_them_when_resumed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def interrupted(folder: Path) -> None:
        raise UsageError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_reports", interrupted)
        assert_refused(verify(*command(tiny, out)), "interrupted")
    assert (out / "run.json").is_file() and not (out / "report.html").exists()
    before = results(out)
    assert verify("ppl", "--resume", str(out)).returncode in (0, 1, 3)
    assert finished(out)
    assert results(out) == before


@pytest.mark.parametrize("where", ["write_reports", "write_results"])
def test_an_interrupt_while_results_are_written_says_how_to_go_on(
    where: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            *{"write_reports": (writing, where), "write_results": (RunFolder, where)}[where], interrupted
        )
        stopped = verify(*command(tiny, out))
    assert (stopped.returncode, stopped.stderr.count(f"go on with: verify ppl --resume {out}")) == (130, 1)
    assert not finished(out)
    assert verify("ppl", "--resume", str(out)).returncode in (0, 1, 3)
    assert finished(out)


def test_an_interrupt_while_a_bar_begins_leaves_a_screen_that_can_be_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the way to go on was not said: of one Ctrl-C in ten right after a line of windows."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    screen = ppl_screen.PplConsole()
    bar = Progress(console=Console(file=io.StringIO(), force_terminal=True))
    monkeypatch.setattr(ppl_screen, "progress_bar", lambda: bar)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Console, "push_render_hook", interrupted)
        screen.begin_bar()
    screen.stop()


class CutOff:
    """Interrupts a run in the middle of the layer number `at`, and counts the layers that were begun."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int = -1) -> None:
        self.layers: list[int] = []
        plain = Group.feed_forward

        def feed_forward(group: Group, layer: int, *arguments: Any) -> Any:
            self.layers.append(layer)
            if layer == at:
                raise KeyboardInterrupt
            return plain(group, layer, *arguments)

        patch.setattr(Group, "feed_forward", feed_forward)


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("--score-last", "9"), marks=pytest.mark.slow),
        ("--measured-windows", "2", "--power"),
    ],
)
def test_a_group_goes_on_between_its_layers(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    options = ("--memory", "8G", "--checkpoint-minutes", "0", *more)
    assert verify(*command(tiny, whole, *options)).returncode in (0, 1, 3)
    with monkeypatch.context() as patch:
        CutOff(patch, at=1)
        done = verify(*command(tiny, out, *options))
    assert done.returncode == EXIT_INTERRUPTED
    assert [f.name for f in (out / "groups").iterdir()] == ["00000.layers"]
    with monkeypatch.context() as patch:
        seen = CutOff(patch)
        done = verify("ppl", "--resume", str(out))
    assert done.returncode in (0, 1, 3), done.stderr
    assert "windows 1 to 6 go on after layer 0" in done.stderr
    assert seen.layers == [1]
    assert finished(out)
    assert results(out) == results(whole)
    runs = [json.loads((folder / "run.json").read_text()) for folder in (whole, out)]
    for name in ("coverage", "drift", "in_place", "pairs", "arms", "power"):
        assert runs[0][name] == runs[1][name], name
    # Arms that are one tensor are one again: nothing is computed twice.
    assert runs[0]["speed"]["product_flop"] == runs[1]["speed"]["product_flop"]


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_run_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    done = verify(*command(tiny, tmp_path / "run", "--checkpoint-minutes", "0", "--memory", "8G"))
    assert done.returncode in (0, 1, 3)
    assert done.stderr.count("failed writing file") == 1
    assert finished(tmp_path / "run")


def test_a_checkpoint_that_is_not_one_is_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        CutOff(patch, at=1)
        verify(*command(tiny, out, "--checkpoint-minutes", "0", "--memory", "8G"))
    (out / "groups/00000.layers").write_bytes(b"not a checkpoint")
    assert_refused(verify("ppl", "--resume", str(out)), "00000.layers", "cannot be read", "remove it")


def test_checkpoints_come_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    now, kept = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    checkpoints = Checkpoints(kept.append, seconds=60, notice=pytest.fail)
    assert not checkpoints.due
    now[0] = 160.0
    assert checkpoints.due
    checkpoints.keep(Checkpoint(range(2), 1, {}, {}))
    assert len(kept) == 1
    assert not checkpoints.due


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments(tiny: Tiny, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert verify_apart(*command(tiny, whole)).returncode in (0, 1, 3)
    draw, kills = random.Random(8), 0
    while kills < 20:
        if finished(parts):
            # The killer met a process that had nothing left to do.
            assert results(parts) == results(whole)
            parts = tmp_path / f"parts-{kills}-{draw.random()}"
        begun = (parts / "settings.json").is_file()
        arguments = ["ppl", "--resume", str(parts)] if begun else command(tiny, parts)
        process = subprocess.Popen(
            [sys.executable, "-m", "verify", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            said = process.communicate(timeout=draw.uniform(1, 25))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        # It was faster than the killer: begin another one.
        assert process.returncode in (0, 1, 3), said
        assert results(parts) == results(whole)
        parts = tmp_path / f"parts-{kills}-{draw.random()}"
    if (parts / "settings.json").is_file() and not finished(parts):
        assert verify_apart("ppl", "--resume", str(parts)).returncode in (0, 1, 3)
        assert results(parts) == results(whole)
