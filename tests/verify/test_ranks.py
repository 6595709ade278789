"""Ranks share the windows out, read the model once a machine, and change no bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.ranks import verify_ranks
from support.synthetic_moe import write_moe
from support.tiny_model import write_text, write_tiny_model

MORE = ("--baseline", "flash:block=16", "--candidate", "flash:block=16,kv=2")


def command(model: Path, text: Path, out: Path, *more: str) -> list[str]:
    base = ["ppl", "-m", str(model), "-f", str(text), "-c", "64", "--chunks", "5", "--device", "cpu"]
    return [*base, "--out", str(out), *MORE, *more]


def run(size: int, model: Path, text: Path, work: Path, *more: str) -> tuple[bytes, dict[str, Any]]:
    work.mkdir()
    out = work / "run"
    done = verify_ranks([command(model, text, out, *more)] * size, work)
    assert [d.returncode for d in done[1:]] == [0] * (size - 1), done
    assert done[0].returncode in (0, 1, 3), done[0].stderr
    assert not any(d.stdout for d in done[1:])
    return (out / "tokens.parquet").read_bytes(), json.loads((out / "run.json").read_text())


def test_ranks_and_memory_change_no_bit(tmp_path: Path) -> None:
    model, text = write_moe(tmp_path / "moe.gguf"), write_text(tmp_path / "text.txt")
    alone, report = run(1, model, text, tmp_path / "alone")
    assert report["speed"]["groups"] == 1
    for size, memory, groups in ((2, "8G", 2), (3, "350K", 5)):
        tokens, shared = run(size, model, text, tmp_path / f"{size}", "--memory", memory)
        assert tokens == alone
        assert shared["verdict"] == report["verdict"]
        assert shared["speed"]["groups"] == groups
        # Experts included: whatever the ranks are, a round of their groups is one read.
        rounds = -(-groups // size)
        assert shared["speed"]["read_bytes"] <= rounds * report["speed"]["read_bytes"]
        if rounds == 1:
            assert shared["speed"]["read_bytes"] == report["speed"]["read_bytes"]


def test_ranks_that_see_different_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    models = [
        write_tiny_model(tmp_path / name / "tiny.gguf", seed=i) for i, name in enumerate((".", "other"))
    ]
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "run"
    done = verify_ranks([command(model, text, out) for model in models], tmp_path)
    assert [d.returncode for d in done] == [2, 2]
    for each in done:
        assert "rank 1 of 2 has another model than rank 0" in each.stderr
        assert len(each.stderr.strip().splitlines()) == 1
