"""`verify diff` from end to end, on small shapes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.cli import Done, assert_refused, verify
from support.tiny_model import write_text, write_tiny_model
from verify.diff import inputs as diff
from verify.kernels import eager
from verify.kernels.oracle_products import multiplying
from verify.laws import LAWS, subject_of
from verify.laws.run import run_law
from verify.model.products import Tiling

KERNELS = Path(__file__).parents[2] / "support/user_kernels.py"
TILINGS = Path(__file__).parents[2] / "support/tilings.py"
PLAIN = "gaussian,needles,gaps,rising,falling,one-sign"


def run(out: Path, *more: str, n_kv: str = "130", inputs: str = PLAIN) -> tuple[Done, dict[str, Any]]:
    base = ["diff", "--device", "cpu", "--shape", "6/2x32", "--n-kv", n_kv, "--inputs", inputs]
    done = verify(*base, "--out", str(out), *more)
    report = json.loads((out / "run.json").read_text()) if (out / "run.json").is_file() else {}
    return done, report


@pytest.mark.slow
def test_an_oracle_in_slices_gives_the_verdict_of_float64(tmp_path: Path) -> None:
    """For a right kernel and for one that drops its last key: words and figures to 1e-6."""
    asked = ["--baseline", "eager", "--candidate", "eager:kv=2"]
    faulty = ["--candidate", f"py:{KERNELS}::last_key_dropped"]
    _, plain = run(tmp_path / "float64", *asked, *faulty, inputs="gaussian,peaked")
    with multiplying(torch.device("cpu"), "int8"):
        _, sliced = run(tmp_path / "int8", *asked, *faulty, inputs="gaussian,peaked")
    assert [pair["verdict"] for pair in sliced["pairs"]] == [pair["verdict"] for pair in plain["pairs"]]
    assert {pair["verdict"] for pair in plain["pairs"]} > {"broken"}
    for cell, other in zip(plain["cells"], sliced["cells"], strict=True):
        for figure in ("max_budget_ratio", "rms_ratio"):
            assert other[figure] == pytest.approx(cell[figure], rel=1e-6), figure


@pytest.mark.pictures
def test_a_split_is_round_off_with_its_evidence(tmp_path: Path) -> None:
    done, report = run(
        tmp_path / "d", "--baseline", "eager", "--candidate", "eager:kv=2", "--seeds", "3", "--margin", "2"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["verdict"] in ("round-off", "improved")
    assert len(report["cells"]) == 6 * 3
    assert all(0 < cell["max_budget_ratio"] <= 1 for cell in report["cells"])
    assert all(cell["rms_ratio"] < cell["rms_limit"] < 2 for cell in report["cells"])
    assert {line["spec"] for line in report["coverage"]} == {"eager", "eager:kv=2"}
    assert "err/budget" in (tmp_path / "d/report.md").read_text()
    page = (tmp_path / "d/report.html").read_text()
    # By head and length: errors over their bounds, and over the baseline's.
    assert page.count("<svg") >= 4 and "by query head and length" in page
    made = [(tmp_path / "d" / name) for name in ("report.md", "report.html")]
    before = [path.read_text() for path in made]
    assert verify("report", str(tmp_path / "d")).returncode == done.returncode
    assert [path.read_text() for path in made] == before
    assert not re.findall(r'(?:src|href)="?(?!data:|#)[^" >]*//', page)


def test_a_path_that_was_asked_for_and_did_not_run_is_inconclusive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch that ignores its cuts gives the baseline's bits; what it closed is counted, so no verdict."""
    plain = eager._launch

    def one_part(*given: Any) -> Any:
        *before, cuts, heads, keys, values = given
        return plain(*before, [(0, bounds[-1]) for bounds in cuts], heads, keys, values)

    monkeypatch.setattr(eager, "_launch", one_part)
    done, report = run(tmp_path / "d", "--baseline", "eager", "--candidate", "eager:kv=2")
    assert done.returncode == 3, done.stdout + done.stderr
    assert (report["verdict"], report["pairs"][0]["bitwise_equal"]) == ("inconclusive", True)
    assert "the path under test did not run" in report["reasons"][0]
    assert {line["parts"] for line in report["coverage"]} == {1}
    law = run_law(LAWS["plan-runs"], subject_of("eager"), examples=40, shrink=False)
    assert law.state == "broken" and "the trace says" in law.reason


@pytest.mark.parametrize("function", ["last_key_dropped", "heads_rotated", "nan_in_one_row", "raises"])
def test_wrong_kernels_are_broken(tmp_path: Path, function: str) -> None:
    done, report = run(tmp_path / "d", "--candidate", f"py:{KERNELS}::{function}")
    assert done.returncode == 1
    assert report["verdict"] == "broken"
    words = ("budget", "NaN", "raised", "sum p|v|")
    assert any(word in reason for word in words for reason in report["reasons"]), report["reasons"]


def test_probes_name_the_key_that_is_wrong(tmp_path: Path) -> None:
    spec = f"py:{KERNELS}::last_key_dropped"
    _, report = run(tmp_path / "d", "--baseline", "eager", "--candidate", spec, inputs="probes")
    assert report["verdict"] == "broken"
    (cell,) = report["cells"]
    assert any("probe one-hot" in failed and "key 129" in failed for failed in cell["probes_failed"])
    _, report = run(
        tmp_path / "e", "--baseline", "eager", "--candidate", "eager:kv=2,p=bf16", inputs="probes"
    )
    assert not report["cells"][0]["probes_failed"]


def test_float16_accumulators_are_degraded_and_the_other_way_round_improved(tmp_path: Path) -> None:
    more = ("--seeds", "4", "--baseline", "eager", "--candidate", "eager:acc=f16")
    done, report = run(tmp_path / "a", *more, n_kv="600")
    assert (done.returncode, report["verdict"]) == (1, "degraded")
    assert report["pairs"][0]["distance_ratio_ci"][0] > 1.1
    done, report = run(
        tmp_path / "b", "--seeds", "4", "--baseline", "eager:acc=f16", "--candidate", "eager", n_kv="600"
    )
    assert (done.returncode, report["verdict"]) == (0, "improved")


def test_an_overflow_of_stated_float16_sums_is_a_limit_and_degrades(tmp_path: Path) -> None:
    """Its own sums, emulated, overflow in the same elements: not broken, and far worse than float32's."""
    done, report = run(
        tmp_path / "d", "--baseline", "eager", "--candidate", "eager:acc=f16", inputs="near-overflow,gaussian"
    )
    assert done.returncode == 1 and report["verdict"] == "degraded"
    (cell,) = [c for c in report["cells"] if c["family"] == "near-overflow"]
    assert cell["faults"] == [] and any("limit of float16 sums" in said for said in cell["suspicions"])
    assert any("limit of float16 sums" in reason for reason in report["reasons"])


def test_a_fault_at_one_length_is_localised(tmp_path: Path) -> None:
    kernel = tmp_path / "long.py"
    kernel.write_text(
        KERNELS.read_text()
        + "\ndef wrong_when_long(q, k, v, *, kv_len, scale):\n"
        + "    return good(q, k, v, kv_len=kv_len - (kv_len > 150).int(), scale=scale)\n"
    )
    _, report = run(tmp_path / "d", "--candidate", f"py:{kernel}::wrong_when_long", n_kv="100,200")
    assert report["verdict"] == "broken"
    assert any("only at n_kv 200" in reason for reason in report["reasons"])
    assert {cell["n_kv"] for cell in report["cells"] if cell["verdict"] == "broken"} == {200}


def test_the_same_plan_is_inconclusive_and_the_same_text_identical(tmp_path: Path) -> None:
    same = ("--baseline", "eager:kv=2", "--candidate", "eager:kv=2")
    done, report = run(tmp_path / "a", *same, "--allow-same", n_kv="60")
    assert (done.returncode, report["verdict"]) == (0, "identical")
    done, report = run(tmp_path / "c", *same, n_kv="60")
    assert (done.returncode, report["verdict"]) == (3, "inconclusive")
    assert "the same specification" in report["reasons"][0]
    done, report = run(tmp_path / "b", "--baseline", "eager", "--candidate", "eager:kv=2", n_kv="60")
    assert (done.returncode, report["verdict"]) == (3, "inconclusive")


def test_the_same_text_is_identical_beside_probes_too(tmp_path: Path) -> None:
    done, report = run(
        tmp_path / "run",
        *("--baseline", "eager", "--candidate", "eager", "--allow-same"),
        inputs="gaussian,probes",
    )
    assert (done.returncode, report["verdict"]) == (0, "identical")
    assert report["pairs"][0]["bitwise_equal"]


def test_probes_alone_compare_nothing(tmp_path: Path) -> None:
    done, report = run(tmp_path / "run", "--baseline", "eager", "--candidate", "eager:kv=2", inputs="probes")
    assert (done.returncode, report["verdict"]) == (3, "inconclusive")
    assert "probes show faults alone" in report["reasons"][0]
    assert not report["pairs"][0]["bitwise_equal"]


def test_more_keys_than_code_words_leave_the_one_hot_probes_out(tmp_path: Path) -> None:
    """Head size 16 tells 2,048 keys apart."""
    more = ("--shape", "6/2x16", "--baseline", "eager", "--candidate", "eager:kv=2")
    done, report = run(tmp_path / "run", *more, n_kv="64,2100", inputs="gaussian,probes")
    assert done.returncode in (0, 3), done.stderr
    assert [note for note in report["notes"] if "left out" in note] == [
        "one-hot probes of 6/2x16 at 2100 keys left out: head size 16 tells 2048 keys apart, not 2105"
    ]
    assert not any(cell["probes_failed"] for cell in report["cells"])


def test_head_groups_alone_are_identical(tmp_path: Path) -> None:
    _, report = run(tmp_path / "d", "--baseline", "eager", "--candidate", "eager:heads=2+1")
    assert report["verdict"] == "identical"


def test_inputs_that_a_kernel_does_not_take_are_left_out_with_a_note(tmp_path: Path) -> None:
    done, report = run(
        tmp_path / "d", "--baseline", "eager", "--candidate", f"py:{KERNELS}::good", inputs="gaussian,sinks"
    )
    assert {cell["family"] for cell in report["cells"]} == {"gaussian"}
    assert any("does not take what inputs sinks need" in note for note in report["notes"])
    assert done.returncode in (0, 3)


def test_the_worst_cell_can_be_made_again(tmp_path: Path) -> None:
    _, report = run(tmp_path / "a", "--baseline", "eager", "--candidate", "eager:kv=2", "--seeds", "2")
    worst = max(report["cells"], key=lambda cell: cell["max_budget_ratio"])
    words = [w.strip("'") for w in worst["again"].split()[1:]]
    assert verify(*words, "--out", str(tmp_path / "b")).returncode in (0, 3)
    (again,) = json.loads((tmp_path / "b/run.json").read_text())["cells"]
    assert again["worst"] == worst["worst"]
    assert again["worst_values"] == worst["worst_values"]


# One that rounds once more is the nearest to harm; the others are asked by the slow tests.
@pytest.mark.parametrize(
    "function", ["rounded_denominator", *(pytest.param(x, marks=pytest.mark.slow) for x in ("tree", "cubic"))]
)
def test_right_tilings_are_decided_at_one_length(tmp_path: Path, function: str) -> None:
    """Families are kinds, not draws: an interval over their unlike ratios decides nothing."""
    _, report = run(
        tmp_path / "d",
        *("--baseline", "eager", "--candidate", f"py:{TILINGS}::{function},acc=f32", "--shape", "9/3x64"),
        n_kv="512",
        inputs="all",
    )
    assert report["verdict"] in ("round-off", "improved"), report["reasons"]
    strata = report["pairs"][0]["strata"]
    assert {s["family"] for s in strata} >= {"gaussian", "needles", "one-sign"}
    assert all(s["ratio_ci"][1] <= 1.25 for s in strata)
    assert all(s["samples"] == 62 for s in strata if not s["heads"])


def test_a_baseline_answers_in_the_type_of_its_candidate(tmp_path: Path) -> None:
    half, brain = (f"py:{TILINGS}::{name},acc=f32" for name in ("half", "brain"))
    small = ("--rows", "16", "--baseline", "eager", "--candidate", half, "--candidate", "eager:kv=2")
    _, report = run(tmp_path / "a", *small, "--candidate", brain, inputs="gaussian,gaps")
    references = [pair["reference"] for pair in report["pairs"]]
    assert references == ["eager:out=f16", "eager", "eager:out=bf16"]
    assert report["pairs"][0]["verdict"] != "degraded", report["pairs"][0]["reasons"]
    assert any("returns float16" in note and "out=f32" in note for note in report["notes"])
    # Written out it is obeyed, and asks what the type costs.
    asked = ("--rows", "16", "--baseline", "eager:out=f32", "--candidate", half)
    _, report = run(tmp_path / "b", *asked, inputs="gaussian,gaps")
    assert report["pairs"][0]["reference"] == "eager:out=f32"
    assert report["verdict"] == "degraded"
    assert report["pairs"][0]["distance_ratio"] > 1.4


def test_no_other_candidate_enters_the_inputs(tmp_path: Path) -> None:
    """The cuts of one plan made the inputs of all, so the worst cell's own command made others."""
    both = ("--baseline", "eager", "--candidate", "eager:kv=4", "--candidate", "eager:kv=3")
    few = ("--rows", "8", "--most-rows", "8")
    _, report = run(tmp_path / "a", *both, *few, n_kv="500", inputs="gaps,needles")
    for i, pair in enumerate(report["pairs"]):
        (cell,) = [c for c in report["cells"] if c["spec"] == pair["candidate"] and c["family"] == "gaps"]
        words = [w.strip("'") for w in cell["again"].split()[1:]]
        verify(*words, "--out", str(tmp_path / f"b{i}"))
        (again,) = json.loads((tmp_path / f"b{i}/run.json").read_text())["cells"]
        assert again["max_budget_ratio"] == cell["max_budget_ratio"]
        assert again["lse_budget_ratio"] == cell["lse_budget_ratio"]
        assert again["rms_ratio"] == cell["rms_ratio"]


def test_the_worst_is_worst_by_the_detector_that_fired(tmp_path: Path) -> None:
    """A log-sum-exp off by 1 at one length: no error of the output is the thing to look at."""
    kernel = tmp_path / "lse.py"
    kernel.write_text(
        KERNELS.read_text()
        + "\nimport math\n\ndef wrong_lse(q, k, v, *, kv_len, scale):\n"
        + "    out, _ = good(q, k, v, kv_len=kv_len, scale=scale)\n"
        + "    x = torch.einsum('bthd,bshd->bths', q.float(), k.float().repeat_interleave(3, 2)) * scale\n"
        + "    see = torch.arange(k.shape[1]) < kv_len[:, :, None, None]\n"
        + "    lse = x.masked_fill(~see, -math.inf).logsumexp(-1)\n"
        + "    return out, lse + (kv_len[..., None] > 150)\n"
    )
    more = ("--candidate", f"py:{kernel}::wrong_lse,acc=f32", "--rows", "4")
    done, report = run(tmp_path / "d", *more, n_kv="100,200", inputs="probes,gaussian,one-sign")
    assert report["verdict"] == "broken"
    again = next(line for line in done.stdout.splitlines() if line.startswith("worst element again"))
    assert "--n-kv 200" in again, again


def test_layers_captured_from_a_run(tmp_path: Path) -> None:
    model, text = write_tiny_model(tmp_path / "tiny.gguf"), write_text(tmp_path / "text.txt")
    ppl = tmp_path / "ppl"
    base = ("ppl", "-m", str(model), "-f", str(text), "-c", "128", "--chunks", "2", "--device", "cpu")
    verify(*base, "--capture", "1", "--out", str(ppl))
    out = tmp_path / "diff"
    done = verify(
        *("diff", "--device", "cpu", "--captured-from", str(ppl), "--out", str(out)),
        *("--baseline", "eager", "--candidate", "eager:kv=2"),
    )
    assert done.returncode in (0, 3), done.stderr
    (cell,) = json.loads((out / "run.json").read_text())["cells"]
    assert cell["family"] == "layer 1"
    assert cell["n_kv"] == 128
    assert cell["max_budget_ratio"] <= 1


def test_one_window_is_captured_of_those_computed_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    monkeypatch.setattr("verify.model.runner.tiling_of", lambda *_: Tiling(256, 2))
    model, text = write_tiny_model(tmp_path / "tiny.gguf"), write_text(tmp_path / "text.txt")
    base = ("ppl", "-m", str(model), "-f", str(text), "-c", "128", "--chunks", "2", "--device", "cpu")
    verify(*base, "--capture", "0", "--out", str(tmp_path / "ppl"))
    found = np.load(tmp_path / "ppl/captured/layer-000.npz")
    assert found["q"].shape[:2] == found["k"].shape[:2] == found["kv_len"].shape == (1, 128)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--shape", "nope"), "unknown shape"),
        (("--n-kv", "0"), "--n-kv 0"),
        (("--inputs", "gausian"), "--inputs gausian"),
        (("--candidate", "flahs"), "did you mean 'flash'"),
        (("--candidate", "eager:heads=8+4"), "sums to 12, expected r = 3"),
        (("--path", "both"), "--path both"),
        (("--shape", "6/2x20", "--candidate", "flash:cache=q8_0"), "multiples of 32"),
        (("--margin", "1"), "--margin"),
        (("--seeds", "0"), "--seeds"),
    ],
)
def test_bad_input(tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    done, _ = run(tmp_path / "d", *more)
    assert_refused(done, said)


def test_a_quantised_cache_is_charged_as_distance_and_is_no_fault(tmp_path: Path) -> None:
    """Its kernel is right about the numbers that it holds; they are farther from those it was given."""
    inputs = "probes,gaussian,rising"
    seeds = ("--seeds", "3")
    done, report = run(
        tmp_path / "a", *seeds, "--baseline", "eager", "--candidate", "flash:cache=q8_0", inputs=inputs
    )
    assert (done.returncode, report["verdict"]) == (1, "degraded"), report["reasons"]
    assert report["pairs"][0]["distance_ratio"] > 3
    assert all(cell["max_budget_ratio"] <= 1 for cell in report["cells"] if cell["family"] != "probes")
    assert not any(cell["probes_failed"] for cell in report["cells"])
    # Between two kernels with the same cache it is no difference.
    both = ("--baseline", "flash:cache=q8_0", "--candidate", "flash:cache=q8_0,kv=2", "--margin", "2")
    done, report = run(tmp_path / "b", *seeds, *both, inputs=inputs)
    assert (done.returncode, report["verdict"]) == (0, "round-off"), report["reasons"]


def test_the_same_inputs_twice_are_no_more_evidence(tmp_path: Path) -> None:
    _, once = run(tmp_path / "a", inputs="gaussian")
    twice = ("--shape", "6/2x32,6/2x32/32", "--n-kv", "130,130")
    _, again = run(tmp_path / "b", *twice, inputs="gaussian,gaussian")
    assert len(again["cells"]) == len(once["cells"]) == 1
    assert again["pairs"][0]["distance_ratio_ci"] == once["pairs"][0]["distance_ratio_ci"]


def test_a_margin_without_end_is_refused(tmp_path: Path) -> None:
    done, _ = run(tmp_path / "a", "--margin", "inf")
    assert_refused(done, "--margin inf")


def test_inputs_of_a_folder_stand_alone(tmp_path: Path) -> None:
    done = verify("diff", "--captured-from", "nowhere", "--out", str(tmp_path / "none"))
    assert_refused(done, "no captured layers there")
    done = verify("diff", "--captured-from", str(tmp_path), "--n-kv", "7", "--out", str(tmp_path / "out"))
    assert_refused(done, "--captured-from", "expected no --shape, --n-kv, --brief, --inputs")


def test_lengths_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    done, _ = run(tmp_path / "a", n_kv="64,99999999999")
    assert_refused(done, "--n-kv 99999999999", "GB are free on cpu")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("can't allocate memory: 8 bytes"), 2)]
)
def test_what_was_measured_before_an_end_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    """Of two lengths the second is cut off."""
    drawn = diff.draw

    def cut_off(family: str, sizes: Any, *more: Any, **options: Any) -> Any:
        if max(sizes.n_kv) > 130:
            raise error
        return drawn(family, sizes, *more, **options)

    monkeypatch.setattr(diff, "draw", cut_off)
    done, report = run(tmp_path / "a", n_kv="130,200", inputs="gaussian,needles")
    assert done.returncode == code
    assert {cell["n_kv"] for cell in report["cells"]} == {130}
    assert len(report["cells"]) == 2
    said = "interrupted after 2 inputs" if code == 130 else "cpu has too little memory, after 6/2x32 at 130"
    assert any(said in note for note in report["notes"])


def test_advice_names_options_that_there_are(tmp_path: Path) -> None:
    more = ("--baseline", "eager:kv=2", "--candidate", "eager:kv=2,block=32", "--margin", "1.05")
    few = ("--rows", "8", "--most-rows")
    done, report = run(tmp_path / "a", *more, *few, "8", inputs="gaussian")
    assert report["verdict"] == "inconclusive", done.stdout
    rows = re.search(r"about --most-rows (\d+) would decide", done.stdout)
    assert rows, done.stdout
    # What it says is so: of four times as many, for chance moves the ratio too.
    _, report = run(tmp_path / "b", *more, *few, str(4 * int(rows[1])), inputs="gaussian")
    assert report["verdict"] in ("round-off", "degraded")
    assert_refused(run(tmp_path / "a")[0], "holds a run already; name another folder")


def test_clean_float32_weights_are_no_fault(tmp_path: Path) -> None:
    """Where one column makes the logits, every partial sum of q.k is as large as they are."""
    families = "gaps,rising,peaked,denormal"
    more = ("--shape", "12/1x128", "--candidate", "eager:p=f32", "--candidate", "eager:acc=f16,kv=4")
    _, report = run(tmp_path / "a", *more, "--seeds", "3", n_kv="64,512", inputs=families)
    assert not [cell["faults"] for cell in report["cells"] if cell["faults"]]
    of_f32 = [cell["rms_ratio"] for cell in report["cells"] if cell["spec"] == "eager:p=f32"]
    assert max(of_f32) < 1.3
    assert max(of_f32) > 0.8, "expected sizes that are far too large would hide faults"


def test_a_kernel_that_takes_nothing_passes_no_probes(tmp_path: Path) -> None:
    done, report = run(tmp_path / "a", "--candidate", f"py:{KERNELS}::refuses", inputs="all")
    assert done.returncode == 3
    assert report["reasons"] == [f"py:{KERNELS}::refuses: it takes none of the inputs"]
