"""Right kernels of the world in `verify diff` and `props`: none is broken, each gets the word that is true.

Faults beside them, so that no allowance hides what it must not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.cli import verify

FILE = Path(__file__).parents[1] / "support/world_kernels.py"
OFFSETS = ["offset_f16_sums", "offset_f32_sums", "offset_3", "conditional_rescale"]


def diff(
    function: str, *more: str, inputs: str = "probes,gaussian,needles", baseline: str = "eager"
) -> dict[str, Any]:
    """run.json of a diff of a function of world_kernels."""
    done = verify(
        "diff", "--shape", "2/1x64", "--n-kv", "300", "--inputs", inputs, "--json", "--baseline", baseline,
        "--candidate", f"py:{FILE}::{function}", *more,
    )  # fmt: skip
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode, done.stderr
    return report


def broken_cells(report: dict[str, Any]) -> list[str]:
    return [fault for cell in report["cells"] for fault in cell["faults"]]


@pytest.mark.parametrize("stated", ["", ",acc=f32"])
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(name, marks=() if name == "offset_f32_sums" else pytest.mark.slow)
        for name in (*OFFSETS, "returns_f16", "returns_bf16", "module", "behind_args", "built_in", "operator")
    ],
)
def test_a_right_kernel_is_not_broken(function: str, stated: str) -> None:
    if function == "offset_f16_sums" and stated:
        pytest.skip("its sums are not float32")
    report = diff(function + stated)
    assert broken_cells(report) == []
    assert report["verdict"] != "broken"


def test_no_care_for_rows_without_keys_is_said_and_is_a_fault_only_if_that_is_asked_for(
    tmp_path: Path,
) -> None:
    report = diff("nothing_for_no_key,acc=f32", inputs="probes")
    assert broken_cells(report) == []
    assert any("contract: a row that sees no key (n_kv = 0) gives nan" in note for note in report["notes"])
    report = diff("nothing_for_no_key,acc=f32", "--strict", inputs="probes")
    assert report["verdict"] == "broken" and "probe empty rows" in broken_cells(report)[0]


def test_a_fault_that_the_baseline_has_to_the_bit_is_not_the_candidates() -> None:
    """Both give Inf where V is large: two names of one function, so that two processes run it."""
    both = f"py:{FILE}::overflows,acc=f32"
    report = diff("overflows,acc=f32,timeout=50", baseline=both, inputs="near-overflow")
    assert broken_cells(report) == [] and report["verdict"] != "broken"
    said = [note for note in report["notes"] if "bit for bit the same: not this change" in note]
    assert said and "both: " in said[0] and "NaN or Inf" in said[0]
    # Beside a baseline that does not have it, it is.
    report = diff("overflows,acc=f32", inputs="near-overflow")
    assert report["verdict"] == "broken"


def test_a_kernel_that_reads_values_in_keys_is_right_at_a_shape_of_mla() -> None:
    """FlashMLA and its like look at K alone: what is drawn has V there. Few rows show it."""
    shape = ("--shape", "glm-4.7-flash", "--n-kv", "70", "--rows", "8", "--most-rows", "8")
    done = verify(
        "diff", *shape, "--inputs", "probes,gaussian", "--json", "--baseline", "eager",
        "--candidate", f"py:{FILE}::latent,acc=f32",
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert broken_cells(report) == [] and report["verdict"] != "broken"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "verdict"), [("alibi_from_the_first_key", None), ("alibi_of_another_slope", "broken")]
)
def test_another_origin_of_alibi_is_no_fault_and_another_slope_is(function: str, verdict: str | None) -> None:
    report = diff(f"{function},acc=f32", inputs="probes,alibi")
    assert (report["verdict"] == "broken") == (verdict == "broken")
    told = [said for cell in report["cells"] for said in cell["suspicions"]]
    assert any("ALiBi counts from another key" in said for said in told) == (verdict is None)


@pytest.mark.slow
def test_parts_that_finish_in_any_order_are_a_property() -> None:
    spec = f"py:{FILE}::finished_in_any_order,acc=f32"
    laws = ("--law", "two-runs", "--law", "masked-keys", "--examples", "10", "--seed", "0")
    done = verify("props", spec, *laws)
    assert done.returncode == 0, done.stdout
    assert "bits differed in" in " ".join(done.stdout.split())
    # Who promises the same bits is held to it.
    done = verify("props", f"{spec},deterministic=yes", *laws)
    assert done.returncode == 1 and "expected the same bits" in done.stdout


@pytest.mark.slow
def test_props_says_the_contract_too() -> None:
    spec = f"py:{FILE}::nothing_for_no_key,acc=f32"
    done = verify("props", spec, "--law", "row-alone", "--examples", "10", "--seed", "0")
    assert done.returncode == 0 and "contract: a row that sees no key" in done.stderr
    done = verify("props", spec, "--strict", "--law", "empty-rows", "--examples", "10", "--seed", "0")
    assert done.returncode == 1
