from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from support.cli import assert_refused
from support.ppl_runs import Tiny, run
from verify.kernels.errors import SpecError
from verify.kernels.plans.spec import parse_spec
from verify.kernels.registry import build_kernel
from verify.ppl.evidence.noise import prediction_interval
from verify.ppl.noise_plans import noise_specs


@pytest.mark.parametrize("ratio", [1, 3, 12, 20])
@pytest.mark.parametrize("n_ctx", [512, 8192])
def test_plans_differ_and_keep_the_arithmetic(ratio: int, n_ctx: int) -> None:
    specs = noise_specs("flash:heads=split,kv=auto,acc=f16", 8, ratio=ratio, n_ctx=n_ctx, seed=0)
    cuts = set()
    for text in specs:
        options = parse_spec(text).options
        assert options["acc"] == "f16"
        assert sum(map(int, options["heads"].split("+"))) == ratio
        cuts.add((options["kv"], options["block"]))
        size = int(options["kv"].removeprefix("size:"))
        assert n_ctx / 32 < size <= n_ctx / 2
        build_kernel(text)
    assert len(cuts) == 8


def test_the_seed_alone_decides() -> None:
    one, same, other = (noise_specs("flash", 8, ratio=3, n_ctx=512, seed=s) for s in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(("baseline", "count"), [("py:mine.py::attend", 2), ("exact", 2), ("flash", 10_000)])
def test_plans_that_are_not_there_are_refused(baseline: str, count: int) -> None:
    with pytest.raises(SpecError, match="--noise"):
        noise_specs(baseline, count, ratio=3, n_ctx=512, seed=0)


def test_one_more_sample_lies_inside_at_the_nominal_rate() -> None:
    draws = np.random.default_rng(0).normal(size=(4000, 9))
    intervals = [prediction_interval(row[:8].tolist()) for row in draws]
    missed = sum(not low <= x <= high for (low, high), x in zip(intervals, draws[:, 8], strict=True))
    # 4 of 4,000 are expected; 13 or more have a chance of 3e-4.
    assert missed <= 12


def test_a_candidate_is_placed_among_correct_plans(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(
        tiny,
        tmp_path / "run",
        *("--baseline", "eager:block=16", "--noise", "3"),
        *("--candidate", "eager:block=16,kv=2", "--candidate", "eager:block=16,p=bf16"),
    )
    assert done.returncode in (0, 1), done.stderr
    (entry,) = report["noise"]
    assert [arm["faults"] for arm in entry["arms"]] == [[], [], []]
    plan, type_of_p = entry["candidates"]
    assert not plan["outside"]
    assert type_of_p["rank"] == 3
    assert type_of_p["theta"] > max(arm["theta"] for arm in entry["arms"]) + 1
    assert {arm["role"] for arm in report["arms"]} >= {"noise"}


def test_one_noise_arm_says_nothing(tiny: Tiny, tmp_path: Path) -> None:
    done, _ = run(tiny, tmp_path / "run", "--noise", "1")
    assert_refused(done, "--noise 1", "at least 2")
