"""A run's folder: nothing of anybody else's is touched, and nobody else's run is believed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.cli import assert_refused, verify, verify_apart
from support.ppl_runs import Tiny, command, write_tiny
from verify.machine.errors import UsageError
from verify.machine.files import Lock, open_plain, write_whole
from verify.ppl.runfolder import RunFolder

KERNELS = ("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2", "--chunks", "2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every file's content and every link's target."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def a_persons_folder(folder: Path) -> Path:
    (folder / "groups/theirs").mkdir(parents=True)
    for name in ("groups/theirs/thesis.txt", "report.md", "tokens.parquet", "writable"):
        (folder / name).write_text("precious")
    return folder


def test_out_touches_no_folder_that_holds_other_files(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = a_persons_folder(tmp_path / "mine")
    before = snapshot(mine)
    assert_refused(verify(*command(tiny, mine, *KERNELS)), f"--out {mine}", "holds other files")
    monkeypatch.chdir(mine)
    for nowhere in ("", "."):
        words = command(tiny, Path("x"), *KERNELS)
        words[words.index("--out") + 1] = nowhere
        assert_refused(verify(*words), "--out .", "holds other files")
    assert snapshot(mine) == before


@pytest.mark.parametrize("groups", [True, False])
def test_every_command_refuses_such_a_folder(tmp_path: Path, groups: bool) -> None:
    mine = a_persons_folder(tmp_path / "mine")
    before = snapshot(mine)
    with pytest.raises(UsageError, match="holds other files"):
        RunFolder.create(mine, groups=groups)
    assert snapshot(mine) == before


def test_what_others_put_among_the_groups_meanwhile_is_left(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    (folder.path / "groups/notes.txt").write_text("precious")
    folder.finish()
    assert snapshot(folder.path) == {"groups.others/notes.txt": b"precious"}


def test_a_link_at_the_place_of_a_report_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("report.md", "report.md.part", "run.json"):
        (folder / name).symlink_to(victim)
    RunFolder(folder).write_text("report.md", "a report")
    assert victim.read_text() == "precious"
    assert (folder / "report.md").read_text() == "a report" and not (folder / "report.md").is_symlink()


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "report.md").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        RunFolder(tmp_path).write_text("report.md", "a report")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_links_and_pipes_are_not_read(tmp_path: Path) -> None:
    write_whole(tmp_path / "plain", b"x")
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    os.mkfifo(tmp_path / "pipe")
    with open_plain(tmp_path / "plain") as file:
        assert file.read() == b"x"
    for name in ("link", "pipe", "nothing"):
        with pytest.raises(OSError):
            open_plain(tmp_path / name)


def test_two_runs_into_one_folder_are_told_so(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    folder = RunFolder.create(out)
    folder.write_settings({"command": "ppl", "settings": {}, "identity": {}})
    assert_refused(verify("ppl", "--resume", str(out)), f"--resume {out}", "another run is writing there now")
    with pytest.raises(UsageError):
        RunFolder.create(out)
    folder.release()
    RunFolder.reopen(out).release()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    script = f"from pathlib import Path\nfrom verify.machine.files import Lock\nLock(Path({str(tmp_path)!r}))"
    hold = subprocess.Popen(
        [sys.executable, "-c", f"{script.replace('Lock(Path', 'x = Lock(Path')}\nprint('held', flush=True)\n"
         "import time; time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert hold.stdout is not None and hold.stdout.readline()
    with pytest.raises(BlockingIOError):
        Lock(tmp_path)
    hold.kill()
    hold.wait()
    Lock(tmp_path).release()


@pytest.mark.slow
def test_two_runs_begun_in_the_same_second_have_a_folder_each(tiny: Tiny, tmp_path: Path) -> None:
    words = [w for w in command(tiny, Path("x"), *KERNELS) if w not in ("--out", "x")]
    both = [
        subprocess.Popen([sys.executable, "-m", "verify", *words], cwd=tmp_path, stdout=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert all(one.wait(200) in (0, 1, 3) for one in both)
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "ä"])
def test_folders_of_odd_names(tiny: Tiny, tmp_path: Path, name: str) -> None:
    done = verify_apart(*command(tiny, tmp_path / name, *KERNELS))
    assert done.returncode in (0, 1, 3), done.stderr
    assert (tmp_path / name / "report.html").is_file()
    assert "\x1b" not in done.stdout
