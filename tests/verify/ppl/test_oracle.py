"""How exact attention multiplies in a run: asked for or measured, stored, kept by who goes on with it."""

from __future__ import annotations

import itertools
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import torch

from support import ppl_runs
from support.cli import assert_refused, verify
from support.ppl_runs import Tiny, write_tiny
from support.ranks import verify_ranks
from verify.kernels import oracle_products
from verify.kernels.oracle_products import Product, TimedProducts
from verify.machine import ranks

FEW = ("--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2", "--chunks", "2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"), block_count=2)


class Counted(NamedTuple):
    """run: the record of a `verify ppl` in this process; used: what exact attention multiplied by."""

    run: dict[str, Any]
    used: set[str]


def counted_run(tiny: Tiny, out: Path, *words: str) -> Counted:
    with pytest.MonkeyPatch.context() as patch:
        used = count_products(patch)
        return Counted(ppl_runs.run(tiny, out, *FEW, *words)[1], used)


def count_products(patch: pytest.MonkeyPatch) -> set[str]:
    """A set to which the name of every product is added that multiplies."""
    used: set[str] = set()

    def counting(name: str, product: Product, *operands: torch.Tensor) -> torch.Tensor:
        used.add(name)
        return product(*operands)

    counted = {name: partial(counting, name, product) for name, product in oracle_products.PRODUCTS.items()}
    patch.setattr("verify.kernels.exact.PRODUCTS", counted)
    return used


@pytest.fixture(scope="module")
def plain(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Counted:
    """A run that says nothing of its oracle, on a CPU."""
    return counted_run(tiny, tmp_path_factory.mktemp("plain") / "run")


def test_a_run_in_slices_says_so_and_has_the_same_verdict(tiny: Tiny, tmp_path: Path, plain: Counted) -> None:
    sliced = counted_run(tiny, tmp_path / "run", "--oracle", "int8")
    for found, due in ((plain, "float64"), (sliced, "int8")):
        assert {found.run["settings"]["oracle"]} == found.used == {due}
        # Said where it is not float64.
        assert sum("--oracle" in note for note in found.run["notes"]) == (due != "float64")
    assert sliced.run["verdict"] == plain.run["verdict"]
    for arm, other in zip(plain.run["arms"], sliced.run["arms"], strict=True):
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
    used = count_products(monkeypatch)
    verify("ppl", "--resume", str(out))
    assert {json.loads((out / "run.json").read_text())["settings"]["oracle"]} == used == {"int8"}


def test_every_rank_takes_the_choice_of_the_first(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which measured something else than this one would."""

    class Led(ranks.Ranks):
        def of_leader(self, own: Any) -> Any:
            return "double-float32" if own == "float64" else own

    monkeypatch.setattr(ranks, "ranks_of_environment", Led)
    assert counted_run(tiny, tmp_path / "run").used == {"double-float32"}


@pytest.mark.slow
def test_two_processes_multiply_as_the_first_measured(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(_: torch.device) -> TimedProducts:
        return TimedProducts("int8" if os.environ["RANK"] == "0" else "double-float32")

    def noting(name: str, product: Product, *operands: torch.Tensor) -> torch.Tensor:
        (tmp_path / f"{os.environ['RANK']} {name}").touch()
        return product(*operands)

    noted = {name: partial(noting, name, product) for name, product in oracle_products.PRODUCTS.items()}
    monkeypatch.setattr(oracle_products, "timed_products", timed)
    monkeypatch.setattr("verify.kernels.exact.PRODUCTS", noted)
    out = tmp_path / "run"
    done = verify_ranks([ppl_runs.command(tiny, out, *FEW)] * 2, tmp_path)
    assert done[1].returncode == 0 and done[0].returncode in (0, 1, 3), done
    assert json.loads((out / "run.json").read_text())["settings"]["oracle"] == "int8"
    assert {x.name for x in tmp_path.glob("? *")} == {"0 int8", "1 int8"}


def test_an_unknown_product_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    done = verify(*ppl_runs.command(tiny, tmp_path / "run", "--oracle", "int4"))
    assert_refused(done, "--oracle int4: expected one of auto, float64, int8, double-float32")
