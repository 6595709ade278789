"""`verify ppl --headroom`: how near float16 sums are to overflow, layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.ppl_runs import run, write_tiny
from verify.diff.captured import captured_inputs
from verify.kernels.judging.headroom import row_headroom
from verify.kernels.registry import build_kernel


def test_headroom_of_a_run_is_that_of_its_layers(tmp_path: Path) -> None:
    tiny, out, spec = write_tiny(tmp_path), tmp_path / "run", "eager:block=16,acc=f16"
    more = ("-c", "128", "--chunks", "1", "--candidate", spec, "--headroom", "--capture", "all")
    done, report = run(tiny, out, *more)
    room = report["headroom"]
    assert (room["order"], room["windows"], room["longer"]) == (spec, 1, None)
    assert [(one["layer"], one["n_kv"]) for one in room["layers"]] == [(0, 64), (0, 128), (1, 64), (1, 128)]
    kernel = build_kernel(spec)
    for inputs in captured_inputs(str(out), "decode", torch.device("cpu")):
        found = row_headroom(inputs.call, kernel.arithmetic_of(inputs.call))
        layer = int(inputs.family.removeprefix("layer "))
        (said,) = (one for one in room["layers"] if (one["layer"], one["n_kv"]) == (layer, 128))
        assert said["partial"] == pytest.approx(float(found.partial[0, -1].max()))
        assert said["head"] == int(found.partial[0, -1].argmax())
        assert said["logit"] == pytest.approx(float(found.logit[0, -1].max()))
    largest = max(one["partial"] for one in room["layers"])
    assert room["offsets"][0]["headroom"] == pytest.approx(65504 / largest)
    assert any(
        note.startswith("headroom of float16 sums: the largest partial sum") for note in report["notes"]
    )
    assert done.stderr.count("headroom") + done.stdout.count("headroom") > 0


def test_without_the_option_there_is_none(tmp_path: Path) -> None:
    _, report = run(write_tiny(tmp_path), tmp_path / "run", "--chunks", "1")
    assert report["headroom"] is None and not (tmp_path / "run" / "headroom.jsonl").exists()
