"""The whole way on a real model and real text, against figures of llama.cpp's family of programs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.cli import verify_apart

# SmolLM2-135M-Instruct.Q4_1 requantised to F32, f16 cache, WikiText-2, n_ctx 512: running perplexity after
# each of four windows, and the error bar, as ik_llama.cpp's program prints them on a CPU.
PUBLISHED = [12.9562, 21.3752, 22.5251, 22.7453]
PUBLISHED_ERROR = 2.27495


# A window takes up to a minute on two slow cores.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{}-windows".format)
def smollm_run(
    request: pytest.FixtureRequest, smollm: Path, wikitext: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    out = tmp_path_factory.mktemp("smollm") / "run"
    arguments = ["ppl", "-m", str(smollm), "-f", str(wikitext), "-c", "512", "--chunks", str(request.param)]
    more = ("--device", "cpu", "--out", str(out), "--save-logits", str(out.parent / "exact.kld"))
    # Apart, so that its memory is its own, and on all cores.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = verify_apart(*arguments, *more, timeout=800, env=environment)
    return json.loads((out / "run.json").read_text()), done.stdout


def test_the_baseline_prints_the_published_perplexity(smollm_run: tuple[dict[str, Any], str]) -> None:
    run, said = smollm_run
    line = next(line for line in said.splitlines() if line.startswith("[1]"))
    running = [float(piece.split("]")[1]) for piece in line.strip(",").split(",")]
    assert running == pytest.approx(PUBLISHED[: run["corpus"]["windows"]], rel=2e-4)


def test_the_error_bar_is_the_published_one(smollm_run: tuple[dict[str, Any], str]) -> None:
    run, _ = smollm_run
    if run["corpus"]["windows"] < len(PUBLISHED):
        pytest.skip("the published error bar is that of four windows: slow tier")
    baseline = next(arm for arm in run["arms"] if arm["name"] == "baseline")
    assert baseline["ppl_se"] == pytest.approx(PUBLISHED_ERROR, rel=1e-3)


def test_the_split_is_round_off(smollm_run: tuple[dict[str, Any], str]) -> None:
    run, _ = smollm_run
    # Four parts round less than one: in each, the largest P is 1, which every type holds exactly.
    assert run["verdict"] in ("round-off", "improved")
    assert 0.6 < run["pairs"][0]["distance_ratio"] < 1.05
    assert run["exit_code"] == 0
    assert run["pairs"][0]["coverage"] == 1.0
    assert any("the CUDA kernel did not run" in note for note in run["notes"])


def test_memory_stays_small(smollm_run: tuple[dict[str, Any], str]) -> None:
    run, _ = smollm_run
    assert 0 < run["speed"]["anonymous_bytes"] < 1.5e9


def test_the_saved_logits_have_the_size_header_and_records_of_the_format(
    smollm_run: tuple[dict[str, Any], str],
) -> None:
    run, _ = smollm_run
    raw = Path(run["settings"]["save_logits"]).read_bytes()
    windows = run["corpus"]["windows"]
    assert len(raw) == 20 + 4 * windows * 512 + windows * 255 * 2 * (49152 + 4)
    assert raw[:8] == b"_logits_"
    assert np.frombuffer(raw, "<i4", 3, 8).tolist() == [512, 49152, windows]
    tokens = np.frombuffer(raw, "<i4", windows * 512, 20).reshape(windows, 512)
    records = np.frombuffer(raw, "<u2", offset=20 + 4 * windows * 512).reshape(windows, 255, 4 + 49152)
    head = np.ascontiguousarray(records[..., :4]).view("<f4")
    targets = tokens[:, 257:]
    codes = np.take_along_axis(records[..., 4:], targets[..., None].astype(int), -1)[..., 0]
    nll = -(head[..., 0] * codes + head[..., 1])
    exact = next(arm for arm in run["arms"] if arm["name"] == "exact")
    # A step is 24/65535 at most: the mean over 1,020 tokens is a thirtieth of it off.
    assert nll.mean() == pytest.approx(exact["nll_mean"], abs=2e-5)
    first = head[0, 0, 0] * records[0, 0, 4:] + head[0, 0, 1]
    assert np.exp(first.astype(float)).sum() == pytest.approx(1, abs=1e-3)
