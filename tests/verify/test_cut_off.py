"""A run that is cut off at any moment goes on, and leaves the bytes of one that was not."""

from __future__ import annotations

import itertools
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from support.cli import assert_refused, verify, verify_apart
from support.tiny_model import write_text, write_tiny_model
from verify.errors import UsageError
from verify.reports import writing

RESULTS = ("tokens.parquet", "layers.parquet")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_model(folder / "tiny.gguf", block_count=2), write_text(folder / "text.txt")


def command(tiny: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    model, text = tiny
    base = ["ppl", "-m", str(model), "-f", str(text), "-c", "64", "--chunks", "6", "--device", "cpu"]
    kernels = ["--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2"]
    return [*base, *kernels, "--memory", "170K", "--out", str(out), *more]


def results(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in RESULTS]


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    tiny: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_at_random_moments(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert verify_apart(*command(tiny, whole)).returncode in (0, 1, 3)
    draw, kills = random.Random(8), 0
    while kills < 10:
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
