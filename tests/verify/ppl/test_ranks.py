"""Ranks share the windows out, read the model once a machine, and change no bit."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from support.cli import verify
from support.ranks import verify_ranks
from support.synthetic_moe import write_moe
from support.tiny_model import write_text, write_tiny_model
from verify.arms.arm import Findings
from verify.arms.own_error import LAYER_SCHEMA
from verify.machine.ranks import Ranks
from verify.ppl import rounds
from verify.ppl.grouping import Grouping, group_windows
from verify.ppl.groups import TOKEN_SCHEMA, GroupResult, join_groups
from verify.ppl.rounds import Rounds
from verify.ppl.top1 import TOP1_SCHEMA

USER_KERNELS = Path(__file__).parents[2] / "support/user_kernels.py"
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
    assert verify(*command(model, text, tmp_path / "alone")).returncode in (0, 1, 3)
    alone = (tmp_path / "alone/tokens.parquet").read_bytes()
    report = json.loads((tmp_path / "alone/run.json").read_text())
    # A process reads the model once, and runs one group.
    assert report["speed"]["groups"] == report["speed"]["processes"]
    once = report["speed"]["read_bytes"] // report["speed"]["groups"]
    for size, memory, groups in ((2, "8G", 2), (3, "350K", 5)):
        tokens, shared = run(size, model, text, tmp_path / f"{size}", "--memory", memory)
        assert tokens == alone
        assert shared["verdict"] == report["verdict"]
        assert shared["speed"]["groups"] == groups
        # Experts included: whatever the ranks are, a round of their groups is one read.
        rounds = -(-groups // size)
        assert shared["speed"]["read_bytes"] <= rounds * once
        if rounds == 1:
            assert shared["speed"]["read_bytes"] == once


def test_a_control_that_differs_in_one_rank_alone_has_all_go_back(tmp_path: Path) -> None:
    """A group whose control differs is run again, by all: ranks take the same tensors, or wait for others."""
    model, text, kernel = (
        write_tiny_model(tmp_path / "tiny.gguf"),
        write_text(tmp_path / "text.txt"),
        tmp_path / "k.py",
    )
    kernel.write_text(
        USER_KERNELS.read_text()
        + "\nimport os\n"
        + "\ndef restless(q, k, v, *, kv_len, scale):\n"
        + "    off = 1e-6 * torch.rand(()) if os.environ.get('RANK') == '1' else 0\n"
        + "    return good(q, k, v, kv_len=kv_len, scale=scale)[0] * (1 + off)\n"
    )
    out = tmp_path / "run"
    asked = [*command(model, text, out), "--baseline", f"py:{kernel}::restless"]
    done = verify_ranks([asked] * 2, tmp_path)
    assert [d.returncode for d in done] == [4, 0], done
    report = json.loads((out / "run.json").read_text())
    assert report["verdict"] == "void" and "the control arm differs" in report["reasons"][0]
    tokens = pq.read_table(out / "tokens.parquet").to_pandas()
    nll = tokens.pivot_table(index=["window", "position"], columns="arm", values="nll")
    differ = (nll["control"] != nll["baseline"]).groupby("window").mean()
    # Five windows in groups of three and two.
    assert list(differ[:3]) == [0, 0, 0] and all(differ[3:] > 0.5)


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


def of_group(
    windows: range, names: list[str], top1: pa.Table | None = None, **findings: Findings
) -> GroupResult:
    """A group that left nothing but what is given."""
    return GroupResult(
        tokens=TOKEN_SCHEMA.empty_table(),
        layers=LAYER_SCHEMA.empty_table(),
        top1=TOP1_SCHEMA.empty_table() if top1 is None else top1,
        findings={name: findings.get(name, Findings()) for name in names},
        traces={},
        drift={"edges": [0, 1], "sums": []},
        windows=windows,
    )


def test_changed_tokens_are_in_the_order_of_the_text() -> None:
    """A group lists all of one candidate, then all of the next; how long it is must not show."""

    def changes(*rows: tuple[int, int, str]) -> pa.Table:
        rest = dict.fromkeys(TOP1_SCHEMA.names[3:], 0) | {"reference": "baseline"}
        lines = [{"window": w, "position": p, "candidate": c} | rest for w, p, c in rows]
        return pa.Table.from_pylist(lines, schema=TOP1_SCHEMA)

    a, b = [(0, 7, "a"), (1, 5, "a")], [(0, 3, "b"), (1, 5, "b")]
    together = join_groups([of_group(range(2), [], changes(*a, *b))])
    apart = join_groups(
        [of_group(range(w, w + 1), [], changes(*(x for x in (*a, *b) if x[0] == w))) for w in range(2)]
    )
    assert together.top1.equals(apart.top1)
    assert together.top1["position"].to_pylist() == [3, 7, 5, 5]
    assert together.top1["candidate"].to_pylist() == ["b", "a", "a", "b"]


class OtherRanks(Ranks):
    """Rank 0 of two; the other one gives what it is told to, in turn."""

    def __init__(self, *given: object) -> None:
        super().__init__(0, 2)
        self.given = list(given)

    def everyones(self, own: Any) -> list[Any]:
        return [own, self.given.pop(0)]

    def of_leader(self, own: Any) -> Any:
        return own


def test_an_arm_that_failed_in_one_rank_runs_in_no_group_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four windows, two a round: what fails in the other rank in the first runs in none of the second."""
    failed = Findings(failure="raised")
    known: list[list[str]] = []

    def run_group(job: Any, chosen: range, *, failed: dict[str, Findings], **_: Any) -> GroupResult:
        known.append(sorted(failed))
        return of_group(chosen, ["candidate"])

    monkeypatch.setattr(rounds, "run_group", run_group)
    theirs = [
        of_group(range(i, i + 1), ["candidate"], candidate=f) for i, f in ((1, failed), (3, Findings()))
    ]
    ranks = OtherRanks(theirs[0], {"candidate": failed}, theirs[1], {})
    listener = SimpleNamespace(notice=print, progress=lambda *_: None)
    job = SimpleNamespace(windows=SimpleNamespace(n_windows=4), runner=SimpleNamespace(device="cpu"))
    results = Rounds(
        job, Grouping(1, 0), folder=None, ranks=ranks, listener=listener, group_done=lambda *_: None
    ).run()
    assert known == [[], ["candidate"]]
    assert join_groups(results).findings["candidate"].failure == "raised"


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verify.ppl.grouping.available_memory", lambda: 64_000)

    def windows() -> int:
        return group_windows(
            windows=100,
            at_once=1,
            n_ctx=8,
            state_bytes=100,
            model_bytes=1 << 40,
            memory=None,
            device=torch.device("cpu"),
        ).windows

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert windows() == 100
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert windows() == 40


def test_nothing_is_loaded_while_a_process_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that another thread loads at that moment could never be loaded in the new process."""
    loading: list[str] = []
    forked: list[list[str]] = []

    def load() -> None:
        loading.append("begun")
        time.sleep(0.2)
        loading.append("ended")

    def at_once(asked: list[Any]) -> list[GroupResult]:
        forked.append(list(loading))
        here: GroupResult = asked[0]()
        return [here, groups[here.windows.stop]]

    groups = [of_group(range(i, i + 1), []) for i in range(4)]
    monkeypatch.setattr(rounds, "at_once", at_once)
    monkeypatch.setattr(rounds, "run_group", lambda job, chosen, **_: groups[chosen.start])
    results = Rounds(
        SimpleNamespace(windows=SimpleNamespace(n_windows=4)),
        Grouping(1, 0),
        folder=None,
        ranks=Ranks(),
        listener=SimpleNamespace(progress=lambda *_: None),
        group_done=lambda *_: None,
        processes=2,
        meanwhile=load,
    ).run()
    assert [result.windows.start for result in results] == [0, 1, 2, 3]
    assert forked == [[], ["begun", "ended"]]
