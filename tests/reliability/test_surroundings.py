"""Full disks, read-only folders, other locales: real ones, where they can be had."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.cli import verify, verify_apart
from support.ppl_runs import Tiny, command, write_tiny

KERNELS = ("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2", "--memory", "170K")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory with these options."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mounted(options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("a file system cannot be mounted here")
        return folder

    yield mounted
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def tables(run: Path) -> list[bytes]:
    return [(run / f"{name}.parquet").read_bytes() for name in ("tokens", "layers")]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_disk_that_is_full_at_five_sizes_keeps_what_is_finished(
    tiny: Tiny, tmp_path: Path, mount: Callable[[str], Path]
) -> None:
    whole = tmp_path / "whole"
    assert verify(*command(tiny, whole, *KERNELS)).returncode in (0, 1, 3)
    disk = mount("size=64k")
    for i, size in enumerate((16, 64, 128, 256, 512)):
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
        out = disk / str(i)
        done = verify(*command(tiny, out, *KERNELS))
        assert done.returncode in (0, 1, 2, 3), done.stderr
        if done.returncode == 2:
            assert "No space left on device" in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1, done.stderr
            assert not list(out.glob("**/.*.part"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        if (out / "settings.json").is_file() and (out / "groups").is_dir():
            assert verify("ppl", "--resume", str(out)).returncode in (0, 1, 3)
            assert tables(out) == tables(whole)
        subprocess.run(["rm", "-r", str(out)], check=False)


@pytest.mark.slow
def test_a_read_only_folder_is_one_line(tiny: Tiny, mount: Callable[[str], Path]) -> None:
    disk = mount("size=64m")
    assert verify(*command(tiny, disk / "run", *KERNELS)).returncode in (0, 1, 3)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for words in (command(tiny, disk / "other", *KERNELS), ["report", str(disk / "run")]):
        done = verify(*words)
        assert done.returncode == 2
        assert "Read-only file system" in done.stderr and "--resume" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


SURROUNDINGS = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "no home": {"HOME": None},
    "no such home": {"HOME": "/nowhere"},
    "narrow": {"COLUMNS": "20", "TERM": "dumb"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_other_surroundings_change_nothing(tiny: Tiny, tmp_path: Path, name: str) -> None:
    whole, out = tmp_path / "whole", tmp_path / ("run" if name == "C" else "run é")
    verify(*command(tiny, whole, *KERNELS, "--chunks", "2"))
    environment = {**os.environ}
    for key, value in SURROUNDINGS[name].items():
        environment.pop(key, None)
        if value is not None:
            environment[key] = value
    done = verify_apart(*command(tiny, out, *KERNELS, "--chunks", "2"), env=environment)
    assert done.returncode in (0, 1, 3), done.stderr
    assert tables(out) == tables(whole)
