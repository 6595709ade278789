"""How exact attention multiplies in a run: asked for or measured, stored, kept by who goes on with it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from support import ppl_runs
from support.cli import assert_refused, verify
from support.ppl_runs import Tiny, write_tiny
from verify.kernels import oracle_products
from verify.kernels.oracle_products import TimedProducts
from verify.machine import ranks

FEW = ("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2", "--chunks", "2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"), block_count=2)


@pytest.fixture(scope="module")
def plain(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The record of a run that says nothing of its oracle, on a CPU."""
    return ppl_runs.run(tiny, tmp_path_factory.mktemp("plain") / "run", *FEW)[1]


def products_of(report: dict[str, Any]) -> set[str]:
    """What the record says that exact attention was multiplied by: asked for, and launched."""
    launched = {line["binary"] for line in report["coverage"] if line["arm"] == "exact"}
    return {report["settings"]["oracle"], *launched}


def test_a_run_in_slices_says_so_and_has_the_same_verdict(
    tiny: Tiny, tmp_path: Path, plain: dict[str, Any]
) -> None:
    _, report = ppl_runs.run(tiny, tmp_path / "run", *FEW, "--oracle", "int8")
    assert (products_of(plain), products_of(report)) == ({"float64"}, {"int8"})
    assert report["verdict"] == plain["verdict"]
    said = [[note for note in x["notes"] if "--oracle" in note] for x in (plain, report)]
    assert (len(said[0]), len(said[1])) == (0, 1)
    for arm, other in zip(plain["arms"], report["arms"], strict=True):
        assert other["nll_mean"] == pytest.approx(arm["nll_mean"], rel=1e-6)


def test_who_goes_on_with_a_run_measures_nothing_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write, calls = tmp_path / "run", pq.write_table, itertools.count()

    def full(*arguments: Any) -> None:
        if next(calls) > 3:
            raise OSError(28, "No space left on device")
        write(*arguments)

    with monkeypatch.context() as patch:
        # As on a GPU where slices are faster.
        patch.setattr(oracle_products, "timed_products", lambda _: TimedProducts("int8"))
        patch.setattr(pq, "write_table", full)
        done = verify(*ppl_runs.command(tiny, out, *FEW, "--memory", "170K"))
        assert done.returncode == 2 and "No space left on device" in done.stderr
    verify("ppl", "--resume", str(out))
    assert products_of(json.loads((out / "run.json").read_text())) == {"int8"}


def test_every_rank_takes_the_choice_of_the_first(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is asked for with the words of its own machine, measured here as something else."""

    class Led(ranks.Ranks):
        def of_leader(self, own: Any) -> Any:
            return "double-float32" if own == "float64" else own

    monkeypatch.setattr(ranks, "ranks_of_environment", Led)
    _, report = ppl_runs.run(tiny, tmp_path / "run", *FEW)
    assert products_of(report) == {"double-float32"}


def test_an_unknown_product_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    done = verify(*ppl_runs.command(tiny, tmp_path / "run", "--oracle", "int4"))
    assert_refused(done, "--oracle int4: expected one of auto, float64, int8, double-float32")
