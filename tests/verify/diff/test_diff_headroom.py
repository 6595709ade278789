"""`verify diff --headroom`: how near float16 sums are to overflow on its inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.cli import verify


def test_headroom_of_a_diff(tmp_path: Path) -> None:
    done = verify(
        "diff", "--baseline", "eager:block=64", "--candidate", "eager:block=32,acc=f16", "--shape", "4/2x32",
        "--n-kv", "40,80,160", "--inputs", "gaussian,one-sign,near-overflow", "--rows", "4", "--headroom",
        "--device", "cpu", "--out", str(tmp_path / "d"), "--json",
    )  # fmt: skip
    run = json.loads(done.stdout)
    (room,) = run["headroom"]
    assert room["candidate"] == "eager:block=32,acc=f16" and len(room["cells"]) == 9
    worst = max(room["cells"], key=lambda cell: cell["partial"])
    assert worst["inputs"] == "near-overflow" and worst["partial"] == room["largest_partial"]
    # Its values are chosen to lie there: float16 sums without an offset have no room.
    assert room["offsets"][0]["headroom"] == pytest.approx(65504 / room["largest_partial"])
    (said,) = [note for note in run["notes"] if note.startswith("headroom of float16 sums")]
    assert f"near-overflow, 4/2x32 at {worst['n_kv']} keys, in the order of eager:block=32,acc=f16" in said
    assert "at 131072 keys" in said
    assert any(note.startswith("warning: float16 sums without an offset") for note in run["notes"])
