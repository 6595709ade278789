"""`verify ppl` from end to end, on a tiny model, as a user runs it."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from support.cli import Done, verify, verify_apart
from support.ppl_runs import Tiny, command, run, write_tiny
from support.tiny_model import write_text, write_tiny_model
from verify.__main__ import main
from verify.arms import building, single_tokens
from verify.arms.own_error import InPlace
from verify.arms.sample import Sample
from verify.kernels.call import Call, Result
from verify.kernels.eager import EagerKernel
from verify.kernels.plans.tile_options import TileOptions
from verify.model import runner
from verify.model.gguf.file import GGUFFile
from verify.model.products import Tiling
from verify.ppl import rounds

TILINGS = Path(__file__).parents[2] / "support/tilings.py"
KERNELS = Path(__file__).parents[2] / "support/user_kernels.py"


def test_a_round_off_run_shows_its_evidence(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(
        tiny, tmp_path / "run", "--candidate", "eager:block=16,kv=2", "--baseline", "eager:block=16"
    )
    assert done.returncode == 0, done.stderr
    assert report["verdict"] == "round-off"
    assert report["exit_code"] == 0
    lines = done.stdout.splitlines()
    assert any(line.startswith("[1]") and "[6]" in line for line in lines)
    assert any(line.startswith("Final estimate: PPL over 6 chunks for n_ctx=64 = ") for line in lines)
    assert any(line.startswith("verdict: round-off: ") for line in lines)
    assert lines[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    by_name = {arm["name"]: arm for arm in report["arms"]}
    assert set(by_name) == {"exact", "floor", "baseline", "control", "candidate"}
    assert by_name["control"]["nll_mean"] == by_name["baseline"]["nll_mean"]
    assert 0 < by_name["floor"]["kld_to_exact_mean"] < 1e-5
    (pair,) = report["pairs"]
    assert pair["tokens"] == 6 * 31
    assert not pair["bitwise_equal"]
    assert pair["coverage"] == 1.0
    assert "round-off" in (tmp_path / "run/report.md").read_text()
    tokens = pq.read_table(tmp_path / "run/tokens.parquet")
    frozen = {"floor/frozen", "baseline/frozen", "candidate/frozen"}
    assert set(tokens["arm"].to_pylist()) == set(by_name) | frozen
    assert tokens.num_rows == (5 + 3) * 6 * 31
    assert set(tokens["position"].to_pylist()) == set(range(32, 63))


def test_coverage_is_what_ran_not_what_was_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    _, report = run(
        tiny, tmp_path / "run", "--baseline", "eager:block=48", "--candidate", "eager:block=48,kv=4"
    )
    lines = [line for line in report["coverage"] if line["arm"] == "candidate"]
    # Up to 48 keys are one tile, which nothing can cut.
    assert [(line["parts"], line["n_kv_min"], line["n_kv_max"]) for line in lines] == [
        (1, 1, 48),
        (2, 49, 64),
    ]
    assert sum(line["rows"] for line in lines) == 6 * 64 * 2
    assert report["pairs"][0]["coverage"] == pytest.approx((63 - 48) / 31)


def test_the_same_command_twice_gives_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    """Here, where much has run before, and in a process of its own."""
    more = ("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2")
    assert run(tiny, tmp_path / "one", *more)[0].returncode == 0
    assert verify_apart(*command(tiny, tmp_path / "two", *more)).returncode == 0
    one, two = ((tmp_path / name / "tokens.parquet").read_bytes() for name in ("one", "two"))
    assert one == two


def test_the_size_of_groups_changes_no_bit(tiny: Tiny, tmp_path: Path) -> None:
    files = []
    for memory, windows in (("80K", 1), ("530K", 4), ("8G", 6)):
        out = tmp_path / memory
        done, report = run(tiny, out, "--memory", memory)
        groups = -(-6 // windows)
        speed = report["speed"]
        assert (speed["group_windows"], speed["groups"]) == (windows, groups)
        # Every tensor once a group for all arms; the embedding, which is the output matrix too, twice.
        with GGUFFile.open(tiny.model) as file:
            once = sum(info.n_bytes for info in file.tensors.values())
            assert speed["read_bytes"] == groups * (once + file.tensor("token_embd.weight").n_bytes)
        assert f"in {groups} group" in done.stdout
        assert f"in {groups} group" in (out / "report.md").read_text()
        files.append((out / "tokens.parquet").read_bytes())
    assert len(set(files)) == 1


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_processes_side_by_side_change_no_bit(tiny: Tiny, tmp_path: Path, two_threads: None) -> None:
    more = ("--baseline", "flash:block=16", "--candidate", "flash:block=16,kv=2")
    done, report = run(tiny, tmp_path / "two", *more)
    assert done.returncode == 0, done.stderr
    assert torch.get_num_threads() == 2
    speed = report["speed"]
    assert (speed["processes"], speed["groups"], speed["group_windows"]) == (2, 2, 3)
    torch.set_num_threads(1)
    _, alone = run(tiny, tmp_path / "one", *more)
    assert (alone["speed"]["processes"], alone["speed"]["groups"]) == (1, 1)
    assert alone["coverage"] == report["coverage"]
    assert alone["pairs"] == report["pairs"]
    one, two = ((tmp_path / name / "tokens.parquet").read_bytes() for name in ("one", "two"))
    assert one == two
    # The same checks in place, in the order of the groups.
    order = [(name, "ascending") for name in ("window", "layer", "arm", "head")]
    first, second = (
        pq.read_table(tmp_path / name / "layers.parquet").sort_by(order) for name in ("one", "two")
    )
    assert str(first.to_pylist()) == str(second.to_pylist())


@pytest.mark.parametrize(
    "more", [("--memory", "8G"), ("--candidate", f"py:{KERNELS}::good"), ("--capture", "0")]
)
def test_runs_that_no_processes_share(
    tiny: Tiny, tmp_path: Path, two_threads: None, more: tuple[str, ...]
) -> None:
    assert run(tiny, tmp_path / "run", *more)[1]["speed"]["processes"] == 1


def test_the_whole_reference_in_float64(tiny: Tiny, tmp_path: Path) -> None:
    reports = {kind: run(tiny, tmp_path / kind, "--compute", kind)[1] for kind in ("f32", "f64")}
    ppl = {kind: [arm["ppl"] for arm in report["arms"]] for kind, report in reports.items()}
    assert ppl["f32"] != ppl["f64"]
    assert ppl["f32"] == pytest.approx(ppl["f64"], rel=1e-3)
    assert any("float64" in note for note in reports["f64"]["notes"])


def test_windows_side_by_side_change_no_bit(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU computes them, here with the tiles of a CPU."""
    more = ("--baseline", "flash:block=16", "--candidate", "flash:block=16,kv=2")
    run(tiny, tmp_path / "alone", *more)
    monkeypatch.setattr(runner, "tiling_of", lambda n_ctx, width, device: Tiling(n_ctx, 4))
    done, report = run(tiny, tmp_path / "together", *more)
    assert report["speed"]["group_windows"] == 6
    assert report["in_place"][0]["checks"] == 6 * 2 * 4
    assert report["in_place"][0]["max_budget_ratio"] < 1
    alone, together = ((tmp_path / name / "tokens.parquet").read_bytes() for name in ("alone", "together"))
    assert alone == together, done.stderr


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("last_key_dropped", "times its rounding budget or of sum p|v|"),
        ("heads_rotated", "times its rounding budget"),
        ("nan_in_one_row", "NaN or Inf"),
        ("hangs,timeout=1", "hung: hangs: no answer within 1 s"),
        ("dies", "died: dies: its process was killed by SIGABRT"),
        ("raises", "raised: raises: RuntimeError: no such luck"),
        ("wrong_shape", "shape: wrong_shape"),
        ("writes_inputs", "wrote-inputs"),
    ],
)
def test_wrong_kernels_are_broken(tiny: Tiny, tmp_path: Path, function: str, said: str) -> None:
    done, report = run(tiny, tmp_path / "run", "--candidate", f"py:{KERNELS}::{function}")
    assert done.returncode == 1, done.stderr
    assert report["verdict"] == "broken"
    assert any(word in " ".join(report["reasons"]) for word in said.split(" or ")), report["reasons"]
    assert "layer" in " ".join(report["reasons"])
    baseline = next(arm for arm in report["arms"] if arm["name"] == "baseline")
    assert baseline["tokens"] == 6 * 31


def test_a_scale_that_is_off_is_caught(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(tiny, tmp_path / "run", "--candidate", f"py:{KERNELS}::scale_off")
    assert done.returncode == 1
    assert report["verdict"] in ("degraded", "broken")


def test_one_failing_candidate_does_not_stop_the_others(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(
        tiny, tmp_path / "run", "--candidate", f"py:{KERNELS}::raises", "--candidate", f"py:{KERNELS}::good"
    )
    assert done.returncode == 1
    first, second = report["pairs"]
    assert first["verdict"] == "broken"
    assert (first["coverage"], first["changed_n_kv"]) == (0, None), "what never ran covers nothing"
    assert second["verdict"] in ("round-off", "improved")
    assert second["tokens"] == 6 * 31


def test_a_baseline_that_is_exact_leaves_its_place_to_the_floor(tiny: Tiny, tmp_path: Path) -> None:
    candidates = ("--baseline", "exact", "--candidate", "exact", "--candidate", "flash", "--allow-same")
    _, report = run(tiny, tmp_path / "run", *candidates)
    same, other = report["pairs"]
    assert same["verdict"] == "identical"
    assert (same["distance_ratio"], same["distance_to"]) == (1, "reference")
    assert other["distance_to"] == "floor"
    assert other["distance_ratio"] > 3
    assert "times the floor's" in other["reasons"][0]
    assert other["frozen_kld_reference"] > 0


def test_a_kernel_that_remembers_is_broken(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured in place is right there; what the model runs on is not."""
    # So that every second call is one that the model runs on.
    monkeypatch.setattr(single_tokens, "asked_rows", lambda *_, **__: [])
    done, report = run(tiny, tmp_path / "run", "--candidate", f"py:{KERNELS}::every_second_call_halved")
    assert done.returncode == 1
    assert "is unsteady: another result for the same call at window 1, layer 0" in report["reasons"][0]


def test_a_kernel_that_refuses_is_no_bug(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(tiny, tmp_path / "run", "--candidate", f"py:{KERNELS}::refuses")
    assert done.returncode == 3
    assert report["verdict"] == "inconclusive"
    assert "candidate does not take this call" in report["reasons"][0]
    assert "not today" in report["reasons"][0]


def test_a_cache_that_all_have_is_no_difference(tmp_path: Path) -> None:
    """A loss beside it is seen as it is without it; a note says what was left out."""
    heads = {"attention__head_count": 2, "attention__head_count_kv": 1}
    model = write_tiny(tmp_path, **heads)
    ratios = []
    for i, cache in enumerate(("", "cache=q8_0,")):
        more = ("--baseline", f"flash:{cache}block=16", "--candidate", f"flash:{cache}block=16,p=bf16")
        done, report = run(model, tmp_path / str(i), *more)
        (pair,) = report["pairs"]
        assert pair["verdict"] == "degraded", done.stdout
        ratios.append(pair["distance_ratio"])
        assert any("all kernels hold q8_0" in note for note in report["notes"]) == bool(cache)
    assert ratios[1] == pytest.approx(ratios[0], rel=0.3)


def test_the_same_specification_is_compared_only_where_that_is_asked(tiny: Tiny, tmp_path: Path) -> None:
    """A variable that fell back to its default would be green for ever."""
    done, report = run(tiny, tmp_path / "run", "--baseline", "flash", "--candidate", "flash")
    assert (done.returncode, report["verdict"]) == (3, "inconclusive")
    assert "the same specification" in report["reasons"][0]
    more = ("--baseline", "flash", "--candidate", "flash", "--allow-same")
    done, report = run(tiny, tmp_path / "again", *more)
    assert (done.returncode, report["verdict"]) == (0, "identical")


def test_a_baseline_answers_in_the_type_of_its_candidate(tiny: Tiny, tmp_path: Path) -> None:
    """One baseline and control a type; a run that goes on has those that it began with."""
    half = f"py:{TILINGS}::half,acc=f32"
    out = tmp_path / "run"
    both = ("--baseline", "eager", "--candidate", half, "--candidate", "eager:kv=2")
    done, report = run(tiny, out, *both)
    arms = {arm["name"]: arm["spec"] for arm in report["arms"]}
    assert arms["baseline"] == arms["control"] == "eager:out=f16"
    assert arms["baseline-2"] == arms["control-2"] == "eager"
    assert [pair["reference"] for pair in report["pairs"]] == ["baseline", "baseline-2"]
    assert report["pairs"][0]["verdict"] != "degraded", report["reasons"]
    assert "returns float16, so it is compared with eager:out=f16" in done.stdout
    assert "with --baseline eager:out=f32 the type's own rounding counts too" in done.stdout
    stored = json.loads((out / "settings.json").read_text())["settings"]
    assert stored["baseline"] == "eager"
    assert stored["baselines"] == ["eager:out=f16", "eager"]
    # Written out it is obeyed.
    _, report = run(tiny, tmp_path / "f32", "--baseline", "eager:out=f32", "--candidate", half)
    assert report["pairs"][0]["verdict"] == "degraded", report["reasons"]


def test_other_head_groups_alone_are_identical(tiny: Tiny, tmp_path: Path) -> None:
    _, report = run(tiny, tmp_path / "run", "--baseline", "eager", "--candidate", "eager:heads=1+1")
    assert report["verdict"] == "identical"
    assert report["pairs"][0]["bitwise_equal"]


def test_a_plan_that_never_differs_is_inconclusive(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(
        tiny,
        tmp_path / "run",
        *("--baseline", "flash:policy=before", "--candidate", "flash:policy=ik-1183,threshold=8192"),
    )
    assert done.returncode == 3
    assert report["verdict"] == "inconclusive"
    assert "the path under test did not run" in report["reasons"][0]


def test_coverage_can_be_a_gate(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(
        tiny,
        tmp_path / "run",
        *("--baseline", "eager:block=48", "--candidate", "eager:block=48,kv=4", "--min-coverage", "0.9"),
    )
    assert done.returncode == 3
    assert "--min-coverage" in report["reasons"][0]


def test_a_baseline_that_gives_other_bits_each_time_voids_the_run(tiny: Tiny, tmp_path: Path) -> None:
    kernel = tmp_path / "restless.py"
    kernel.write_text(
        KERNELS.read_text()
        + "\ndef restless(q, k, v, *, kv_len, scale):\n"
        + "    return good(q, k, v, kv_len=kv_len, scale=scale)[0] * (1 + 1e-6 * torch.rand(()))\n"
    )
    done, report = run(tiny, tmp_path / "run", "--baseline", f"py:{kernel}::restless", "--candidate", "eager")
    assert done.returncode == 4
    assert report["verdict"] == "void"
    assert "the control arm differs from its baseline" in report["reasons"][0]
    # Its logits are its own, though an output of its baseline's bits would have stood in its place.
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert arms["control"]["nll_mean"] != arms["baseline"]["nll_mean"]


def test_both_paths_are_judged_apart(tiny: Tiny, tmp_path: Path) -> None:
    _, report = run(tiny, tmp_path / "run", "--path", "both", "--candidate", "flash:block=16,kv=2")
    assert [pair["path"] for pair in report["pairs"]] == ["decode", "prefill"]
    assert {line["path"] for line in report["coverage"]} == {"decode", "prefill"}


def test_json_alone_goes_to_stdout(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(tiny, tmp_path / "run", "--json")
    assert json.loads(done.stdout) == report
    assert "Final estimate" in done.stderr


def test_a_progress_bar_on_a_terminal(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["verify", *command(tiny, tmp_path / "run")])
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the terminal closes with its last writer
            while piece := os.read(ours, 4096):
                seen.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with (
        os.fdopen(theirs, "w") as screen,
        redirect_stderr(screen),
        redirect_stdout(io.StringIO()),
        pytest.raises(SystemExit),
    ):
        main()
    reader.join(timeout=60)
    os.close(ours)
    assert b"windows 1 to 6 of 6" in b"".join(seen)


def test_no_progress_bar_in_a_pipe(tiny: Tiny, tmp_path: Path) -> None:
    done, _ = run(tiny, tmp_path / "run")
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    """By a signal to a process of its own; in this process: test_cut_off.py, test_only.py."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        KERNELS.read_text()
        + "\ndef slow(q, k, v, *, kv_len, scale):\n"
        + "    time.sleep(float(__import__('os').environ.get('NAP_S', 0)))\n"
        + "    return good(q, k, v, kv_len=kv_len, scale=scale)\n"
    )
    more = ("--memory", "80K", "--candidate", f"py:{slow}::slow")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tiny, whole, *more)
    process = subprocess.Popen(
        [sys.executable, "-m", "verify", *command(tiny, parts, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Only the run that is interrupted has to last.
        env={**os.environ, "NAP_S": "0.15"},
        # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(2400):  # a busy machine takes long to start
        if len(list(parts.glob("groups/*"))) >= 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: verify ppl --resume {parts}" in said
    assert not (parts / "run.json").exists()
    kept = len(list(parts.glob("groups/*/state.json")))
    assert 1 <= kept < 6
    done = verify("ppl", "--resume", str(parts), "--candidate", f"py:{slow}::slow")
    assert done.returncode == json.loads((whole / "run.json").read_text())["exit_code"], done.stderr
    assert (parts / "tokens.parquet").read_bytes() == (whole / "tokens.parquet").read_bytes()


def test_variables_that_the_user_set_are_kept() -> None:
    done = verify_apart("doctor", env={**os.environ, "MKL_CBWR": "COMPATIBLE"})
    assert "COMPATIBLE" in done.stdout
    assert "STRICT" not in done.stdout


@pytest.mark.parametrize(
    ("windows", "at_once", "stride"),
    [(4, 1, 1), (64, 1, 1), (65, 1, 2), (592, 1, 10), (592, 32, 10), (37, 2, 1)],
)
def test_of_many_windows_some_are_checked_in_place(windows: int, at_once: int, stride: int) -> None:
    assert InPlace(Sample(windows, at_once=at_once), at_once=at_once).stride == stride


class OutOfMemory(EagerKernel):
    """`eager`, on a device that is full for calls in a group of more than two windows."""

    def __init__(self, limit: int) -> None:
        super().__init__("full", TileOptions())
        self.limit = limit

    def run(self, call: Call) -> Result:
        # Not of the few rows that a kernel is tried on.
        if call.shape.rows > 2 and OutOfMemory.group > self.limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().run(call)

    group = 0


@pytest.mark.parametrize(("limit", "groups"), [(3, 2), (0, None)])
def test_a_kernel_without_memory_makes_groups_smaller(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, groups: int | None
) -> None:
    plain = rounds.run_group

    def counted(job: Any, chosen: range, **more: Any) -> Any:
        OutOfMemory.group = len(chosen)
        return plain(job, chosen, **more)

    monkeypatch.setattr(rounds, "run_group", counted)
    build = building.build_shared_kernel
    monkeypatch.setattr(
        building,
        "build_shared_kernel",
        lambda spec, gpus: OutOfMemory(limit) if spec == "eager:kv=2" else build(spec, gpus),
    )
    done, report = run(tiny, tmp_path / "run", "--candidate", "eager:kv=2", "--memory", "8G")
    if groups is None:
        assert_refused_last(done, "too little memory for 1 windows", "expected a smaller -c")
        return
    assert report["speed"]["groups"] == groups
    assert report["verdict"] != "broken"
    assert "too little memory for 6 windows: groups of 3" in done.stderr


def assert_refused_last(done: Done, *said: str) -> None:
    assert done.returncode == 2
    assert all(words in done.stderr.splitlines()[-1] for words in said), done.stderr


def test_a_model_that_overflows_is_no_fault_of_a_kernel(tmp_path: Path) -> None:
    model, text = write_tiny_model(tmp_path / "tiny.gguf", key_spread=1e6), write_text(tmp_path / "text.txt")
    done, report = run(Tiny(model, text), tmp_path / "run")
    assert done.returncode == 4
    assert report["verdict"] == "void"
    assert any("exact attention gives NaN or Inf, first at window 1" in why for why in report["reasons"])


class FailsOn(EagerKernel):
    """`eager` that raises in a call of so many sequences."""

    def __init__(self, batch: int) -> None:
        super().__init__("fails", TileOptions())
        self.batch = batch

    def run(self, call: Call) -> Result:
        if call.shape.batch == self.batch:
            raise RuntimeError("this batch is too much")
        return super().run(call)


def test_a_baseline_that_fails_half_way_is_what_is_broken(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows side by side, four and then two: the candidate has nothing of the same shape to differ from."""
    monkeypatch.setattr(runner, "tiling_of", lambda *_: Tiling(256, 4))
    build = building.build_shared_kernel
    monkeypatch.setattr(
        building,
        "build_shared_kernel",
        lambda spec, gpus: FailsOn(2) if spec == "eager:block=16" else build(spec, gpus),
    )
    done, report = run(tiny, tmp_path / "run", "--baseline", "eager:block=16", "--candidate", "eager:kv=2")
    assert (done.returncode, report["verdict"]) == (1, "broken")
    assert any("this batch is too much" in why for why in report["reasons"])


def test_brackets_in_a_specification_are_no_markup(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "[old]"
    folder.mkdir()
    (folder / "k.py").write_text(KERNELS.read_text())
    done, _ = run(tiny, tmp_path / "run", "--candidate", f"py:{folder}/k.py::good")
    assert "[old]/k.py" in "".join(done.stdout.split())


def test_every_command_takes_debug() -> None:
    assert verify("list", "--debug").returncode == 0
