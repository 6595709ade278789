"""A stranger's run folder is data: it runs nothing, writes nothing outside, and steers no terminal."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.cli import assert_refused, verify
from support.ppl_runs import Tiny, command, write_tiny
from verify.arms.records import SCHEMA
from verify.ppl.runfolder import RunFolder

EVIL = "from pathlib import Path\nPath(__file__).with_name('PWNED').touch()\n"
GOOD = "import torch\ndef attend(q, k, v, *, kv_len, scale):\n    return torch.zeros_like(q)\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    kernels = ("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2")
    verify(*command(tiny, out, *kernels, "--chunks", "2"))
    return out


@pytest.fixture(scope="module")
def unfinished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was ended after its groups, of one window each."""
    out = tmp_path_factory.mktemp("unfinished") / "run"
    kernels = ("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_results", interrupted)
        verify(*command(tiny, out, *kernels, "--chunks", "2", "--memory", "1K"))
    return out


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to


def edit(file: Path, **change: Any) -> None:
    content = json.loads(file.read_text())
    content.update(change)
    file.write_text(json.dumps(content))


def test_a_report_follows_no_link(finished: Path, tmp_path: Path) -> None:
    run, victim = copied(finished, tmp_path / "run"), tmp_path / "victim"
    victim.write_text("precious")
    edit(run / "run.json", reasons=["x\nexport PATH=/evil:$PATH\n"])
    for name in ("report.md.part", "report.html.part", "report.md", "report.html"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(victim)
    assert verify("report", str(run)).returncode == 0
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["run.json", "tokens.parquet"])
def test_a_report_waits_for_no_pipe_and_reads_no_link(finished: Path, tmp_path: Path, name: str) -> None:
    run = copied(finished, tmp_path / "run")
    (run / name).rename(tmp_path / name)
    (run / name).symlink_to(tmp_path / name)
    linked = verify("report", str(run))
    (run / name).unlink()
    os.mkfifo(run / name)
    piped = verify("report", str(run))
    if name == "run.json":
        for done in (linked, piped):
            assert_refused(done, "is not finished")
    else:
        assert linked.returncode == piped.returncode == 0


def test_escapes_in_a_run_reach_no_terminal_and_no_page(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    bad = "\x1b]0;owned\x07\x1b[2J \ud800 \u202e"
    content = json.loads((run / "run.json").read_text())
    content |= {"verdict": bad, "reasons": [bad], "notes": [bad]}
    for arm in content["arms"]:
        arm["spec"] = f"{arm['spec']}{bad}"
    (run / "run.json").write_text(json.dumps(content))
    done = verify("report", str(run))
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, (run / "report.md").read_text(), (run / "report.html").read_text()):
        assert not set("\x1b\x07\u202e") & set(text)
        assert "\\x1b]0;owned" in text


def stranger(folder: Path, tiny: Tiny, **settings: Any) -> Path:
    """A run folder that asks for more than its reader meant."""
    folder.mkdir(parents=True)
    (folder / "evil.py").write_text(EVIL + GOOD)
    base = {"candidates": ["eager:block=16"], "model": str(tiny.model), "file": str(tiny.text), "n_ctx": 64}
    stored = {"command": "ppl", "schema": SCHEMA, "settings": base | settings, "folder": "."}
    stored["identity"] = {"kernels": []}
    (folder / "settings.json").write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize("field", ["candidates", "baseline"])
def test_resuming_runs_no_code_that_the_command_line_does_not_name(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = "py:run/evil.py::attend"
    run = stranger(tmp_path / "run", tiny, **{field: [spec] if field == "candidates" else spec})
    option = "--candidate" if field == "candidates" else "--baseline"
    done = verify("ppl", "--resume", "run")
    assert_refused(done, "which a folder alone cannot ask for", f"{option} {spec}")
    # Named again it must still be what the run began with, which is looked at before it runs.
    assert_refused(verify("ppl", "--resume", "run", option, spec), "changed since the run began")
    assert not (run / "PWNED").exists()


def test_resuming_writes_no_file_outside_that_the_command_line_does_not_name(
    tiny: Tiny, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = stranger(tmp_path / "run", tiny, save_logits=str(victim))
    assert_refused(verify("ppl", "--resume", str(run)), "this run writes", f"--save-logits {victim}")
    assert victim.read_text() == "precious"


def test_code_of_a_relative_name_is_named_from_where_the_run_was_begun(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a stranger's folder would decide which file a name on the command line means."""
    run = stranger(tmp_path / "theirs", tiny, candidates=["py:evil.py::attend"])
    edit(run / "settings.json", folder=str(run))
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    (tmp_path / "mine/evil.py").write_text(GOOD)
    done = verify("ppl", "--resume", str(run), "--candidate", "py:evil.py::attend")
    assert_refused(done, "go on from there")
    assert not (run / "PWNED").exists()


def test_a_run_of_ones_own_kernel_goes_on_when_it_is_named_again(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(GOOD)
    out, spec = tmp_path / "run", f"py:{tmp_path / 'mine.py'}::attend"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_group", interrupted)
        done = verify(*command(tiny, out, "--baseline", "eager", "--candidate", spec, "--chunks", "1"))
    assert done.returncode == 130
    assert f"go on with: verify ppl --resume {out} --candidate {spec}" in done.stderr
    done = verify("ppl", "--resume", str(out), "--candidate", spec)
    assert done.returncode == 1, done.stderr
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("name", ["groups", "groups/00000", "captured"])
def test_a_folder_with_links_is_not_gone_on_with(unfinished: Path, tmp_path: Path, name: str) -> None:
    run, elsewhere = copied(unfinished, tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    if (run / name).exists():
        shutil.rmtree(run / name)
    (run / name).symlink_to(elsewhere)
    assert_refused(verify("ppl", "--resume", str(run)), f"{name} is a link")
    assert not list(elsewhere.iterdir())


def change_tokens(file: Path, how: str) -> None:
    table = pq.read_table(file)
    half = table.slice(0, len(table) // 2)
    changed = {
        "half of the rows": half,
        "no rows": table.slice(0, 0),
        "rows twice": pa.concat_tables([table, table]),
        "other windows": table.set_column(0, "window", pa.array(np.full(len(table), 1, np.int32))),
        "other columns": table.drop_columns(["nll"]),
    }[how]
    pq.write_table(changed, file)


@pytest.mark.parametrize(
    "how", ["half of the rows", "no rows", "rows twice", "other windows", "other columns"]
)
def test_a_group_that_is_not_whole_is_seen(unfinished: Path, tmp_path: Path, how: str) -> None:
    run = copied(unfinished, tmp_path / "run")
    change_tokens(run / "groups/00000/tokens.parquet", how)
    assert_refused(verify("ppl", "--resume", str(run)), "00000 of groups cannot be read", "remove it")


@pytest.mark.parametrize(
    "change",
    [{"windows": [0, 2]}, {"windows": [0, 10**30]}, {"findings": 3}, {"findings": {}}, {"drift": []}],
)
def test_a_groups_state_that_was_tampered_with_is_seen(
    unfinished: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    run = copied(unfinished, tmp_path / "run")
    edit(run / "groups/00000/state.json", **change)
    assert_refused(verify("ppl", "--resume", str(run)), "00000 of groups cannot be read", "remove it")


@pytest.mark.parametrize("change", [{"seed": 1}, {"cache_type": "bf16"}, {"path": "prefill"}])
def test_settings_edited_by_hand_do_not_mix_with_finished_groups(
    unfinished: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    run = copied(unfinished, tmp_path / "run")
    stored = json.loads((run / "settings.json").read_text())
    stored["settings"] |= change
    (run / "settings.json").write_text(json.dumps(stored))
    assert_refused(verify("ppl", "--resume", str(run)), "is of a run with other settings")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reasons", 3),
        ("arms", {}),
        ("arms", [3]),
        ("settings", []),
        ("notes", [{}]),
        ("pairs", [{"reasons": 1}]),
    ],
)
def test_a_run_json_that_is_none_is_named(finished: Path, tmp_path: Path, field: str, value: Any) -> None:
    run = copied(finished, tmp_path / "run")
    edit(run / "run.json", **{field: value})
    assert_refused(verify("report", str(run)), "run.json", f"{field}", "expected")


def test_json_nested_without_end_is_no_json(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path / "run")
    (run / "run.json").write_text("[" * 100_000)
    assert_refused(verify("report", str(run)), "cannot be read")
    (run / "run.json").unlink()
    shutil.copy(run / "settings.json", tmp_path / "settings.json")
    (tmp_path / "settings.json").write_text('{"settings": ' + "[" * 100_000)
    assert_refused(verify("ppl", "--resume", str(tmp_path)), "settings.json cannot be read")
