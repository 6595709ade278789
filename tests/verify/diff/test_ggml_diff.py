"""`verify diff` on the real operator of two builds of ggml, from end to end."""

from __future__ import annotations

import json
from pathlib import Path

from support.cli import assert_refused, verify
from support.ggml_builds import ggml_library

SHAPE = ("--device", "cpu", "--shape", "glm-4.5-air@8", "--n-kv", "600")


def test_two_builds_head_groups_and_float16_sums(tmp_path: Path) -> None:
    """Builds and head groups change no bit; two threads cut the keys; a q8_0 cache is distance, no fault."""
    a, b = (f"ggml:lib={ggml_library(name)}" for name in ("A", "B"))
    candidates = [b, f"{a},heads=8+4", f"{a},threads=2", f"{a},cache=q8_0"]
    more = [word for spec in candidates for word in ("--candidate", spec)]
    inputs = "gaussian,rising,sinks"
    done = verify("diff", *SHAPE, "--inputs", inputs, "--baseline", a, *more, "--out", str(tmp_path / "d"))
    report = json.loads((tmp_path / "d/run.json").read_text())
    assert done.returncode == report["exit_code"], done.stderr
    found = {pair["candidate"]: pair for pair in report["pairs"]}
    assert [found[spec]["verdict"] for spec in candidates[:2]] == ["identical", "identical"]
    assert found[candidates[2]]["distance_ratio"] < 1
    assert found[candidates[3]]["verdict"] == "degraded"
    assert not any(cell["faults"] for cell in report["cells"])
    launched = {line["spec"]: (line["head_groups"], line["launch"]) for line in report["coverage"]}
    assert launched[a] == ([12], "one") and launched[candidates[1]] == ([8, 4], "each")
    assert len({line["binary"] for line in report["coverage"]}) == 2


def test_bad_libraries_are_one_line_and_exit_2(tmp_path: Path) -> None:
    text = tmp_path / "libggml.so"
    text.write_text("not a library\n")
    done = verify("diff", *SHAPE, "--candidate", f"ggml:lib={text}")
    assert_refused(done, "does not load")
    done = verify("diff", *SHAPE, "--candidate", f"ggml:lib={ggml_library('A')},heads=8+3")
    assert_refused(done, "sums to 11, expected r = 12")
