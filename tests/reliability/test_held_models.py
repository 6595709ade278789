"""What was measured is what is named: a model's file that changes during a run ends it, by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from support.cli import assert_refused, verify
from support.ppl_runs import Tiny, command, write_tiny
from support.tiny_model import write_tiny_model
from verify.model.gguf.file import GGUFFile
from verify.model.gguf.held import ModelChanged
from verify.ppl.runfolder import RunFolder


def replaced(model: Path) -> None:
    write_tiny_model(model.with_name("other"), seed=1)
    model.with_name("other").replace(model)


def overwritten(model: Path) -> None:
    with model.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


def overwritten_in_secret(model: Path) -> None:
    before = model.stat()
    overwritten(model)
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "was replaced": replaced,
    "was written to": overwritten,
    "holds other bytes": overwritten_in_secret,
    "is gone": Path.unlink,
    "has 1000 bytes now": lambda model: os.truncate(model, 1000),
}


@pytest.mark.parametrize("said", CHANGES)
def test_every_change_is_seen_and_named(tmp_path: Path, said: str) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    with GGUFFile.open(model) as file:
        file.check_unchanged()
        CHANGES[said](model)
        with pytest.raises(ModelChanged, match=said):
            file.check_unchanged()


@pytest.mark.parametrize("change", [lambda p: p.chmod(0o600), lambda p: os.link(p, f"{p}.2"), lambda p: None])
def test_a_new_mode_or_name_is_no_change(tmp_path: Path, change: Callable[[Path], None]) -> None:
    model = write_tiny_model(tmp_path / "tiny.gguf")
    with GGUFFile.open(model) as file:
        change(model)
        file.check_unchanged()


@pytest.mark.parametrize(
    "said",
    ["was replaced", *(pytest.param(s, marks=pytest.mark.slow) for s in ("was written to", "is gone"))],
)
def test_a_run_ends_by_name_and_keeps_its_finished_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    tiny, out = write_tiny(tmp_path), tmp_path / "run"
    shutil.copy2(tiny.model, tmp_path / "whole.gguf")
    kernels = ("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2", "--memory", "1K")
    keep = RunFolder.save_group

    def save(folder: RunFolder, first: int, result: object) -> None:
        keep(folder, first, result)  # type: ignore[arg-type]
        if first == 1:
            CHANGES[said](tiny.model)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_group", save)
        done = verify(*command(tiny, out, *kernels, "--chunks", "4"))
    assert_refused(done, str(tiny.model), said, f"--resume {out}")
    assert sorted(path.name for path in (out / "groups").iterdir()) == ["00000", "00001"]
    (tmp_path / "whole.gguf").replace(tiny.model)
    done = verify("ppl", "--resume", str(out))
    assert done.returncode in (0, 3), done.stderr
    assert GGUFFile.open(tiny.model).fingerprint in (out / "run.json").read_text()


def test_a_run_of_a_tiny_text_names_the_model_that_it_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is replaced once everything is measured: name and figures are of the old one."""
    tiny: Tiny = write_tiny(tmp_path)
    before = GGUFFile.open(tiny.model).fingerprint
    keep = RunFolder.save_group

    def save(folder: RunFolder, first: int, result: object) -> None:
        keep(folder, first, result)  # type: ignore[arg-type]
        replaced(tiny.model)

    monkeypatch.setattr(RunFolder, "save_group", save)
    kernels = ("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2", "--chunks", "1")
    verify(*command(tiny, tmp_path / "run", *kernels))
    assert before in (tmp_path / "run/run.json").read_text()
    assert GGUFFile.open(tiny.model).fingerprint != before


def test_a_piece_that_is_read_again_must_be_the_same(tmp_path: Path) -> None:
    """Where a file system does not tell of a change."""
    import torch

    from verify.model.stopwatch import Stopwatch
    from verify.model.stream import TensorStream

    model = write_tiny_model(tmp_path / "tiny.gguf")
    with GGUFFile.open(model) as file:
        name, info = list(file.tensors.items())[-1]
        stream = TensorStream(file, torch.device("cpu"), Stopwatch(torch.device("cpu")))
        stream.take(name)
        stream.take(name)
        with model.open("r+b") as written:
            written.seek(info.offset)
            written.write(np.float32(17).tobytes())
        with pytest.raises(ModelChanged, match=f"tensor {name} holds other bytes"):
            stream.take(name)
        stream.close()
