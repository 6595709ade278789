"""A finished run judged by today's rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.cli import assert_refused, verify
from support.ppl_runs import Tiny, run


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rejudge") / "run"
    run(tiny, out, "--baseline", "eager", "--candidate", "eager:kv=2", "--candidate", "eager:acc=f16")
    return out


def rewritten(finished: Path, folder: Path, **changes: Any) -> Path:
    """The same folder with other words in its run.json."""
    folder.mkdir()
    for name in ("tokens.parquet", "layers.parquet"):
        (folder / name).write_bytes((finished / name).read_bytes())
    stored = json.loads((finished / "run.json").read_text()) | changes
    (folder / "run.json").write_text(json.dumps(stored))
    return folder


def test_a_run_of_today_is_what_it_was(finished: Path) -> None:
    stored = json.loads((finished / "run.json").read_text())
    done = verify("report", "--rejudge", str(finished))
    assert done.returncode == stored["exit_code"]
    assert "harm up to 1.25 is round-off, closer than 1/1.1 is improved" in done.stdout
    assert "0 of 2 pairs changed" in done.stdout
    for pair in stored["pairs"]:
        assert f"{pair['verdict']}: {'; '.join(pair['reasons'])} (as it was)" in done.stdout


def test_what_changed_is_said_and_the_folder_stays(finished: Path, tmp_path: Path) -> None:
    stored = json.loads((finished / "run.json").read_text())
    first, second = stored["pairs"]
    before = first | {"verdict": "degraded", "reasons": ["1.15 times (1.11 to 1.2): farther, beyond 1.1"]}
    old = rewritten(finished, tmp_path / "old", pairs=[before, second], verdict="degraded")
    text = (old / "run.json").read_text()
    done = verify("report", "--rejudge", str(old))
    assert f"eager:kv=2: {first['verdict']}: " in done.stdout
    assert "it was degraded: 1.15 times (1.11 to 1.2): farther, beyond 1.1" in done.stdout
    assert "1 of 2 pairs changed" in done.stdout
    assert (old / "run.json").read_text() == text
    assert sorted(p.name for p in old.iterdir()) == ["layers.parquet", "run.json", "tokens.parquet"]


def test_todays_rules_are_those_of_the_run_itself(finished: Path, tmp_path: Path) -> None:
    """The margin is the run's; the same specification twice is no comparison any more."""
    stored = json.loads((finished / "run.json").read_text())
    wide = rewritten(finished, tmp_path / "wide", settings=stored["settings"] | {"margin": 1e6})
    assert "eager:acc=f16: round-off" in verify("report", "--rejudge", str(wide)).stdout
    arms = [arm | {"spec": "eager"} if arm["role"] == "candidate" else arm for arm in stored["arms"]]
    same = rewritten(finished, tmp_path / "same", arms=arms)
    done = verify("report", "--rejudge", str(same))
    assert done.returncode == 3
    assert "the same specification" in done.stdout


def test_what_cannot_be_judged_again_is_refused(finished: Path, tmp_path: Path) -> None:
    assert_refused(verify("report", "--rejudge", str(finished), str(finished)), "expected one run")
    bare = rewritten(finished, tmp_path / "bare")
    (bare / "tokens.parquet").unlink()
    assert_refused(verify("report", "--rejudge", str(bare)), "tokens.parquet")
    void = rewritten(finished, tmp_path / "void", verdict="void")
    assert_refused(verify("report", "--rejudge", str(void)), "void")
