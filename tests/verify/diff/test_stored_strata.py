"""What a diff keeps of its rows: judged again they say what was said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from support.cli import assert_refused, verify
from verify.diff.stored_strata import STRATA, packed, unpacked

KERNELS = Path(__file__).parents[2] / "support/user_kernels.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("strata") / "run"
    specs = ("eager:kv=2", "eager:p=bf16", f"py:{KERNELS}::scale_off,acc=f32")
    candidates = [word for spec in specs for word in ("--candidate", spec)]
    small = ("--shape", "4/2x32", "--n-kv", "130", "--inputs", "gaussian,needles", "--baseline", "eager")
    verify("diff", *small, *candidates, "--out", str(out))
    return out


def test_a_diff_of_today_is_what_it_was(finished: Path) -> None:
    stored = json.loads((finished / "run.json").read_text())
    assert {pair["verdict"] for pair in stored["pairs"]} >= {"broken", "degraded"}
    done = verify("report", "--rejudge", str(finished))
    assert done.returncode == stored["exit_code"]
    assert "0 of 3 pairs changed" in done.stdout
    assert f"verdict: {stored['verdict']}; it was {stored['verdict']}" in done.stdout


def test_another_rule_is_seen(finished: Path) -> None:
    pairs = dict(unpacked(finished / STRATA))
    coarse = pairs["eager:p=bf16"]
    assert coarse.verdict == "degraded"
    wide = coarse._replace(evidence=type(coarse.evidence)(**{**vars(coarse.evidence), "margin": 100.0}))
    assert wide.judge().verdict == "round-off"


def test_what_candidates_share_is_held_once(finished: Path, tmp_path: Path) -> None:
    pairs = unpacked(finished / STRATA)
    first = pairs[:1]
    twice = [("a", first[0][1]), ("b", first[0][1])]
    assert len(packed(twice)) < 1.2 * len(packed(first))
    file = tmp_path / "few.npz"
    file.write_bytes(packed(pairs, digits=10))
    for (_, was), (_, now) in zip(pairs, unpacked(file), strict=True):
        for a, b in zip(was.strata, now.strata, strict=True):
            np.testing.assert_allclose(b.candidate, a.candidate, rtol=2.0**-10)
        assert now.judge().verdict == was.judge().verdict


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"PK", packed([])[:40]):
        (tmp_path / STRATA).write_bytes(content)
        done = verify("report", "--rejudge", str(tmp_path))
        assert_refused(done, STRATA, "expected the strata of a diff")
