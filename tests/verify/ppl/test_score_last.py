"""`--score-last N`: the end of a window, over keys and values that were computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from support.cli import assert_refused
from support.plain_arms import ExactArm, logits_of, relative
from support.ppl_runs import Tiny, run
from verify.model.architectures import architecture_of
from verify.model.gguf.file import GGUFFile
from verify.model.layer_call import LayerCall
from verify.model.runner import Runner

SCORED = range(20, 31)


class Counting(ExactArm):
    """Exact, and counts the rows that it was asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.rows = 0

    def attend(self, call: LayerCall) -> torch.Tensor | None:
        self.rows += call.q.shape[1]
        return super().attend(call)


def test_a_prompt_is_computed_once_and_changes_nothing(tiny: Tiny) -> None:
    runner = Runner(architecture_of(GGUFFile.open(tiny.model)), device=torch.device("cpu"))
    tokens = np.random.default_rng(0).integers(0, 200, (2, 31))
    whole, a, b, prompt = ExactArm("whole"), Counting("a"), Counting("b"), Counting("prompt")
    apart = logits_of(runner, tokens, [whole], SCORED)["whole"]
    found = logits_of(runner, tokens, [a, b], SCORED, prompt=prompt)
    assert set(found) == {"a", "b"}
    assert torch.equal(found["a"], found["b"])
    # The tiles of the products have another shape: float32 rounding, and casts that it flips.
    assert relative(found["a"], apart) < 1e-3
    layers = runner.architecture.sizes.layers
    assert prompt.rows == 2 * layers * SCORED.start
    assert a.rows == b.rows == 2 * layers * len(SCORED)


def test_only_the_end_is_scored_and_launched(tiny: Tiny, tmp_path: Path) -> None:
    done, report = run(
        tiny,
        tmp_path / "run",
        *("--score-last", "8", "--baseline", "eager:block=16", "--candidate", "eager:block=16,kv=2"),
    )
    assert done.returncode in (0, 3), done.stderr
    tokens = pq.read_table(tmp_path / "run/tokens.parquet")
    assert set(tokens["n_kv"].to_pylist()) == set(range(56, 64))
    assert report["corpus"]["scored_per_window"] == 8
    lines = {line["arm"]: line for line in report["coverage"]}
    assert (lines["candidate"]["n_kv_min"], lines["candidate"]["n_kv_max"]) == (56, 63)
    assert lines["candidate"]["rows"] == 6 * 8 * 2
    assert (lines["prompt"]["path"], lines["prompt"]["rows"]) == ("prefill", 6 * 55 * 2)
    assert report["pairs"][0]["coverage"] == 1.0
    assert report["drift"]["edges"][0] == 55


def test_a_threshold_is_reached_by_the_last_rows(tiny: Tiny, tmp_path: Path) -> None:
    # Sizes before and after a threshold in one window: only the tokens beyond it count as covered.
    _, report = run(
        tiny,
        tmp_path / "run",
        *("--score-last", "20", "--baseline", "eager:block=48", "--candidate", "eager:block=48,kv=2"),
    )
    (pair,) = report["pairs"]
    assert pair["changed_n_kv"] == [49, 63]
    assert pair["coverage"] == pytest.approx(15 / 20)
    assert pair["coverage_rows"] == pytest.approx(15 / 20)


@pytest.mark.parametrize("positions", ["0", "64"])
def test_positions_that_a_window_has_not(tiny: Tiny, tmp_path: Path, positions: str) -> None:
    done, _ = run(tiny, tmp_path / "run", "--score-last", positions)
    assert_refused(done, f"--score-last {positions}", "expected 1 to 63")
