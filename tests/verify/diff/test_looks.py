"""Kinds of input that cannot decide are drawn again, and nothing else is."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from verify.arms.alone import TimeShare
from verify.diff import inputs, run
from verify.diff.examining import CellInputs
from verify.diff.inputs import DiffSettings, all_inputs
from verify.diff.results import DiffOutcome
from verify.diff.run import run_diff
from verify.diff.stored_strata import STRATA, packed, unpacked
from verify.judge.strata import judge_strata
from verify.kernels.judging import families
from verify.machine.errors import UsageError
from verify.machine.jsontext import to_json_text
from verify.machine.stages import StageClock

# P in float16; for one query token 1.4 times as far off, in no direction.
KERNELS = """
import torch

def good(q, k, v, *, kv_len, scale):
    ratio = q.shape[2] // k.shape[2]
    s = scale * torch.einsum("bthd,bshd->bhts", q.float(), k.float().repeat_interleave(ratio, 2))
    s = s.masked_fill(torch.arange(k.shape[1]) >= kv_len[:, None, :, None], -torch.inf)
    p = torch.exp(s - s.amax(-1, keepdim=True))
    weights = p.half().float() / p.sum(-1, keepdim=True)
    return torch.einsum("bhts,bshd->bthd", weights, v.float().repeat_interleave(ratio, 2))

def noisy_alone(q, k, v, *, kv_len, scale):
    out = good(q, k, v, kv_len=kv_len, scale=scale)
    if q.shape[1] > 1:
        return out
    return out + 2.2e-4 * out.square().mean(-1, keepdim=True).sqrt() * (1e6 * out).sin()
"""
CPU = torch.device("cpu")
SETTINGS = DiffSettings(
    shapes=("6/3x32",),
    n_kvs=(64,),
    families=("gaussian", "rising"),
    baseline="eager",
    candidates=("eager:block=32", "eager:p=bf16"),
    device="cpu",
    rows=8,
)


def diffed(settings: DiffSettings) -> DiffOutcome:
    clock = StageClock(CPU)
    return run_diff(settings, CPU, all_inputs(settings, CPU, clock), clock)


def without_time(found: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in found.items() if name not in ("seconds", "environment")}


def test_inputs_are_drawn_where_they_are_first_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And once: of processes that share them each draws its own."""
    drawn: list[str] = []

    def draw(family: str, *about: Any, **more: Any) -> Any:
        drawn.append(family)
        return families.draw(family, *about, **more)

    monkeypatch.setattr(inputs, "draw", draw)
    first, second = all_inputs(SETTINGS, CPU, StageClock(CPU))
    assert drawn == [] and isinstance(first, CellInputs) and isinstance(second, CellInputs)
    call = second.exact_call
    assert second.call is call and replace(second, look=2).call is call
    assert drawn == ["rising"]
    assert torch.equal(
        first.call.q, families.draw("gaussian", inputs.sizes_of_cell(SETTINGS, "6/3x32", 64, "gaussian"), 0).q
    )
    assert not hasattr(first, "calls")


def test_processes_side_by_side_find_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, families=("probes", "gaussian", "peaked", "sequences"), most_rows=32)
    asked: list[int] = []
    shared = run.answered

    def by(processes: int) -> str:
        def answered(inputs: Any, work: Any, of_threads: int) -> Any:
            asked.append(of_threads)
            return shared(inputs, work, processes)

        monkeypatch.setattr(run, "answered", answered)
        found = without_time(diffed(settings).run)
        return to_json_text(found)

    assert by(1) == by(2)
    # The first inputs, and looks.
    assert len(asked) > 2
    assert set(asked) == {torch.get_num_threads()}


def test_kernels_in_processes_of_their_own_are_asked_by_one(tmp_path: Path) -> None:
    (tmp_path / "k.py").write_text(KERNELS)
    settings = replace(SETTINGS, candidates=(f"py:{tmp_path / 'k.py'}::good",), most_rows=8)
    pids: set[int] = set()

    def shared(inputs: Any, work: Any, processes: int) -> Any:
        assert processes == 1
        pids.add(os.getpid())
        yield from ()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "answered", shared)
        patch.setattr(torch, "get_num_threads", lambda: 2)
        diffed(settings)
    assert pids == {os.getpid()}


def test_few_rows_become_more_where_they_cannot_decide() -> None:
    once = diffed(replace(SETTINGS, most_rows=8))
    assert [r.verdict for r in once.candidates] == ["inconclusive", "degraded"]
    again = diffed(SETTINGS)
    right, wrong = again.candidates
    assert right.verdict == "round-off", right.reasons
    # A candidate that is decided is not asked again, nor a kind that is.
    assert Counter(c.inputs.family for c in wrong.cells) == {"gaussian": 1, "rising": 1}
    drawn = Counter(c.inputs.family for c in right.cells)
    for s in right.strata.strata:
        assert drawn[s.family] == 2 ** (s.look - 1)
        assert s.samples == sum(len(c.stratum.candidate) for c in right.cells if c.inputs.family == s.family
                                and c.stratum is not None)  # fmt: skip
    assert max(drawn.values()) > 1
    # No draw is there twice.
    assert len({(c.inputs.family, c.inputs.seed) for c in right.cells}) == len(right.cells)
    (note,) = [note for note in again.notes if "were drawn again" in note]
    assert note.startswith("eager:block=32: ") and "with 8 rows" in note
    assert again.run["settings"]["looks"] == 5
    looks = [s["looks"] for s in again.run["pairs"][0]["strata"]]
    assert looks == [s.look for s in right.strata.strata] and max(looks) > 1
    assert without_time(diffed(SETTINGS).run) == without_time(again.run)


def test_a_pair_that_was_looked_at_again_is_stored_with_its_looks(tmp_path: Path) -> None:
    """Judged again, its limits are what they were."""
    (right,) = diffed(replace(SETTINGS, candidates=("eager:block=32",))).candidates
    assert max(s.look for s in right.strata.strata) > 1
    stored = right.stored()
    assert stored is not None
    (tmp_path / STRATA).write_bytes(packed([("right", stored)]))
    ((_, again),) = unpacked(tmp_path / STRATA)
    found = judge_strata(again.strata, 1.25).strata
    for now, was in zip(found, right.strata.strata, strict=True):
        assert (now.look, now.word) == (was.look, was.word)
        assert (now.low, now.high) == pytest.approx((was.low, was.high), rel=1e-4)


def test_single_tokens_that_hint_at_harm_are_asked_until_they_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight a cell cannot tell 1.4 times from chance: that passed as round-off. Time keeps nobody from it."""
    (tmp_path / "mine.py").write_text(KERNELS)
    settings = replace(
        SETTINGS,
        shapes=("4/1x64",),
        n_kvs=(300,),
        families=("rising",),
        rows=64,
        candidates=(f"py:{tmp_path}/mine.py::noisy_alone",),
    )
    monkeypatch.setattr(TimeShare, "allows", lambda self: True)
    (once,) = diffed(replace(settings, most_rows=64)).candidates
    assert once.verdict == "round-off" and once.alone is not None
    assert {s.word for s in once.alone.strata} == {"inconclusive"}
    first = iter([True])
    monkeypatch.setattr(TimeShare, "allows", lambda self: next(first, False))
    (again,) = diffed(settings).candidates
    assert again.verdict == "degraded", again.reasons
    assert again.reasons[0].startswith("one query token a call: degraded")
    assert len({c.inputs.seed for c in again.cells}) == len(again.cells) > 1


def test_what_stays_undecided_says_so_after_its_last_look() -> None:
    settings = replace(SETTINGS, candidates=("eager:block=32",), families=("gaussian",), margin=1.001)
    (found,) = diffed(replace(settings, rows=4, most_rows=15)).candidates
    assert found.verdict == "inconclusive" and len(found.cells) == 2, found.reasons
    (stratum,) = found.strata.strata
    assert stratum.look == 2
    assert "would decide" in found.reasons[-1] or "no number of rows" in found.reasons[-1]


def test_fewer_rows_at_most_than_at_first_are_refused() -> None:
    with pytest.raises(UsageError, match="--most-rows 4: expected at least --rows, 8"):
        replace(SETTINGS, most_rows=4)
