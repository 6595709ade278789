"""`verify ppl --split-mode graph`: KV heads by GPU, plans that follow from them, and one result anywhere."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from support.cli import assert_refused, verify
from support.ppl_runs import Tiny, run
from support.ranks import verify_ranks
from verify.arms.records import TensorParallelRecord
from verify.arms.split_mode import build_shared_kernel, check_model
from verify.kernels.errors import SpecError
from verify.kernels.heads import Heads
from verify.kernels.tensor_parallel import TensorParallelKernel
from verify.machine.errors import UsageError
from verify.model.architectures.architecture import ModelSizes
from verify.model.architectures.deepseek2 import Deepseek2
from verify.reports.split_mode import split_mode_sentence

CANDIDATE = "eager:policy=ik-1190,threshold=0,block=16"
KERNELS = ("--chunks", "3", "--baseline", "eager:block=16", "--candidate", CANDIDATE)
GRAPH = ("--split-mode", "graph", "--gpus", "2")
Whole = tuple[Path, dict[str, Any], str]


@pytest.fixture(scope="module")
def plain(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The same without the options."""
    out = tmp_path_factory.mktemp("plain") / "run"
    done, found = run(tiny, out, *KERNELS)
    return out, found, done.stdout


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run over two GPUs: its folder, run.json and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done, found = run(tiny, out, *KERNELS, *GRAPH)
    return out, found, done.stdout


def tokens(out: Path) -> bytes:
    return (out / "tokens.parquet").read_bytes()


def test_one_gpu_is_no_option_bit_for_bit(tiny: Tiny, plain: Whole, tmp_path: Path) -> None:
    out = tmp_path / "one"
    _, found = run(tiny, out, *KERNELS, "--split-mode", "graph", "--gpus", "1")
    assert tokens(out) == tokens(plain[0])
    assert found["coverage"] == plain[1]["coverage"]
    assert found["tensor_parallel"] is None


def test_the_run_says_how_it_was_shared_out(whole: Whole) -> None:
    out, found, printed = whole
    assert found["tensor_parallel"] == {"gpus": 2, "kv_heads_by_gpu": [1, 1]}
    assert found["settings"]["split_mode"] == "graph" and found["settings"]["gpus"] == 2
    line = "split mode graph over 2 GPUs: 1 KV head a GPU"
    assert line in printed.splitlines()
    for report in ("report.md", "report.html"):
        assert line in (out / report).read_text()
    assert "--split-mode graph --gpus 2" in (out / "report.html").read_text()


def test_products_of_every_arm_are_summed_over_the_gpus(plain: Whole, whole: Whole) -> None:
    of_exact = [
        pq.read_table(folder / "tokens.parquet", filters=[("arm", "=", "exact")])["nll"].to_numpy()
        for folder in (plain[0], whole[0])
    ]
    assert (of_exact[0] != of_exact[1]).any()
    assert of_exact[0] == pytest.approx(of_exact[1], rel=1e-3)
    # The same rows, once a GPU.
    rows = [sum(line["rows"] for line in found["coverage"]) for found in (plain[1], whole[1])]
    assert rows[1] == 2 * rows[0]
    assert whole[1]["verdict"] != "void"
    assert max(found["max_budget_ratio"] for found in whole[1]["in_place"]) <= 1


def test_groups_processes_and_an_interruption_change_no_bit(
    tiny: Tiny, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ["ppl", "-m", str(tiny.model), "-f", str(tiny.text), "-c", "64", "--device", "cpu"]
    base += [*KERNELS, *GRAPH, "--memory", "170K", "--out"]
    done = verify_ranks([[*base, str(tmp_path / "apart")]] * 2, tmp_path)
    assert done[1].returncode == 0, done[1].stderr
    assert json.loads((tmp_path / "apart/run.json").read_text())["speed"]["groups"] > 1
    assert tokens(tmp_path / "apart") == tokens(whole[0])

    out = tmp_path / "cut"
    write, calls = pq.write_table, itertools.count()

    def full(*arguments: Any) -> None:
        if next(calls) > 3:
            raise OSError(28, "No space left on device")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", full)
        verify(*base, str(out))
    assert list((out / "groups").iterdir())
    verify("ppl", "--resume", str(out), "--memory", "8G")
    assert tokens(out) == tokens(whole[0])


def ran_at(spec: str, gpus: int, n_kv: int) -> set[tuple[int, ...]]:
    """Head groups that a kernel runs on 8 KV heads with 12 query heads each, as `gpus` GPUs share them."""
    kernel = build_shared_kernel(spec, gpus)
    q = torch.zeros(1, 1, 96, 16, dtype=torch.float16)
    k = torch.zeros(1, n_kv, 8, 16, dtype=torch.float16)
    result = kernel.attend(q, k, k, kv_len=torch.tensor([[n_kv]], dtype=torch.int32), scale=1.0)
    return {signature.head_groups for _, _, signature in result.launched.rows}


@pytest.mark.parametrize("policy", ["ik-1183,threshold=256", "ik-1190,threshold=2048"])
@pytest.mark.parametrize(("gpus", "first"), [(1, 1), (2, 257), (4, 769)])
def test_policies_split_by_the_kv_heads_of_a_gpu(policy: str, gpus: int, first: int) -> None:
    spec = f"eager:policy={policy}"
    assert ran_at(spec, gpus, first) == {(8, 4)}
    if first > 1:
        assert ran_at(spec, gpus, first - 1) == {(4, 4, 4)}
        # The specification may say the same as the run.
        assert ran_at(f"{spec},gpus={gpus},split_mode=graph", gpus, first - 1) == {(4, 4, 4)}
        assert ran_at(f"{spec},gpus={gpus},split_mode=graph", gpus, first) == {(8, 4)}


@pytest.mark.parametrize("options", ["gpus=4,split_mode=graph", "split_mode=layer", "gpus=4"])
def test_a_specification_of_other_gpus_is_refused(options: str) -> None:
    with pytest.raises(SpecError, match="but the run has --split-mode graph --gpus 2"):
        build_shared_kernel(f"eager:policy=ik-1183,{options}", 2)


def test_a_kernel_keeps_the_specification_that_was_written() -> None:
    kernel = build_shared_kernel("eager:policy=ik-1183", 2)
    assert isinstance(kernel, TensorParallelKernel)
    assert kernel.spec == "eager:policy=ik-1183"
    assert kernel.inner.spec == "eager:policy=ik-1183,split_mode=graph,gpus=1"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--split-mode", "row"), "--split-mode row: expected layer or graph"),
        (("--split-mode", "graph", "--gpus", "0"), "--gpus 0: expected at least 1"),
        (("--gpus", "2"), "expected --split-mode graph beside it"),
        (("--split-mode", "graph", "--gpus", "3"), "has 2 KV heads, expected at least one for each GPU"),
        ((*GRAPH, "--candidate", "eager:policy=ik-1183,gpus=4"), "split_mode=graph,gpus=4, but the run has"),
    ],
)
def test_what_cannot_be_shared_out_is_one_line(tiny: Tiny, tmp_path: Path, more: Any, said: str) -> None:
    done, found = run(tiny, tmp_path / "run", *more)
    assert_refused(done, said)
    assert not found


def test_the_one_head_of_mla_cannot_be_shared_out() -> None:
    mla = Deepseek2.__new__(Deepseek2)
    mla.sizes = ModelSizes(2, 64, Heads(20, 1, 576, 512), 300, 128)
    mla.file = SimpleNamespace(path=Path("mla.gguf"))  # type: ignore[assignment]
    check_model(mla, 1)
    said = r"mla.gguf has 1 KV head \(the latent one of MLA\), expected at least one for each GPU"
    with pytest.raises(UsageError, match=said):
        check_model(mla, 2)


def test_unequal_shares_are_spelled_out() -> None:
    found = TensorParallelRecord(gpus=3, kv_heads_by_gpu=[2, 3, 3])
    assert split_mode_sentence(found) == (
        "split mode graph over 3 GPUs: 2 KV heads on 1 of them, 3 KV heads on 2 of them"
    )
    assert split_mode_sentence(None) is None


def test_text_is_written_as_over_two_gpus(tiny: Tiny, tmp_path: Path) -> None:
    base = ["gen", "-m", str(tiny.model), "-p", "the moth sat on that", "-n", "4", "--device", "cpu"]
    base += ["--baseline", "eager:block=16", "--candidate", CANDIDATE, "--ignore-eos"]
    found = []
    for name, more in (("plain", ()), ("graph", GRAPH)):
        done = verify(*base, *more, "--out", str(tmp_path / name))
        assert done.returncode in (0, 3), done.stderr
        found.append(json.loads((tmp_path / name / "run.json").read_text()))
    assert "split mode graph over 2 GPUs: 1 KV head a GPU" in done.stdout.splitlines()
    assert "--split-mode graph --gpus 2" in (tmp_path / "graph/report.html").read_text()
    assert [run["tensor_parallel"] for run in found] == [None, {"gpus": 2, "kv_heads_by_gpu": [1, 1]}]
    rows = [sum(line["rows"] for line in run["coverage"]) for run in found]
    assert rows[1] == 2 * rows[0]
    nll = [pq.read_table(tmp_path / n / "tokens.parquet")["nll"].to_numpy() for n in ("plain", "graph")]
    assert (nll[0] != nll[1]).any()
    assert nll[0] == pytest.approx(nll[1], rel=1e-2, abs=1e-4)
