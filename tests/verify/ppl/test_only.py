"""`verify ppl --only`: one kernel, one pass, several models and texts."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.cli import assert_refused, verify
from support.ppl_runs import write_tiny
from support.tiny_model import write_text, write_tiny_model
from verify.data import corpora, cut_windows, strided_windows
from verify.data.corpora import load_corpus
from verify.data.corpus import corpus_from_bytes
from verify.data.errors import CorpusError
from verify.ppl import only
from verify.reports import writing
from verify.reports.progress import Foretelling

BASE = ("ppl", "--only", "exact", "--device", "cpu", "-c", "64", "--chunks", "4")


def test_several_models_in_one_table_with_paired_errors(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path)
    other = write_tiny_model(tmp_path / "other.gguf", seed=5)
    tables = tmp_path / "t.csv", tmp_path / "t.md"
    models = [word for path in (tiny.model, tiny.model, other) for word in ("-m", str(path))]
    written = ("--csv", str(tables[0]), "--md", str(tables[1]), "--out", str(tmp_path / "run"))
    done = verify(*BASE, *models, "-f", str(tiny.text), *written, "--json")
    assert done.returncode == 0, done.stderr
    first, same, third = json.loads(done.stdout)["rows"]
    assert first["against"] is None and first["windows"] == 4
    assert same["against"]["ln_ratio"] == {"value": 0.0, "error": 0.0}
    assert same["against"]["same_top"]["value"] == 1.0
    assert third["against"]["ln_ratio"]["value"] == pytest.approx(third["nll_mean"] - first["nll_mean"])
    assert third["against"]["ln_ratio"]["error"] > 0
    assert np.log(first["by_window"]).mean() == pytest.approx(first["nll_mean"])
    parts = first["by_position"]
    assert (parts[0]["n_kv_min"], parts[-1]["n_kv_max"]) == (33, 63)
    lines = list(csv.DictReader(io.StringIO(tables[0].read_text())))
    assert [float(line["ppl"]) for line in lines] == [row["ppl"] for row in (first, same, third)]
    assert tables[1].read_text().splitlines()[0].startswith("| model | size | bits a weight | PPL | ln PPL")
    page = (tmp_path / "run/report.md").read_text()
    assert page.startswith("## verify ppl --only: measured") and "other.gguf" in page
    assert verify("report", str(tmp_path / "run")).returncode == 0
    assert (tmp_path / "run/report.md").read_text() == page


def test_it_is_the_perplexity_of_the_comparison(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path)
    alone = verify(*BASE, "-m", str(tiny.model), "-f", str(tiny.text), "--out", str(tmp_path / "alone"))
    compared = verify("ppl", *BASE[3:], "-m", str(tiny.model), "-f", str(tiny.text), "--baseline", "eager",
                      "--candidate", "eager:kv=2", "--out", str(tmp_path / "run"))  # fmt: skip
    assert alone.returncode == 0 and compared.returncode in (0, 3), alone.stderr + compared.stderr
    (row,) = json.loads((tmp_path / "alone/run.json").read_text())["rows"]
    arms = {arm["name"]: arm for arm in json.loads((tmp_path / "run/run.json").read_text())["arms"]}
    assert row["ppl"] == pytest.approx(arms["exact"]["ppl"], rel=1e-6)
    assert "Final estimate: PPL over 4 chunks for n_ctx=64 = " in alone.stdout


def test_with_a_stride_each_token_is_scored_once_after_nearly_a_window() -> None:
    ids = np.arange(1000)
    windows = strided_windows(ids, n_ctx=64, stride=16)
    assert windows.n_ctx == 72 and windows.scored_per_window == 16
    scored = windows.targets.ravel().tolist()
    assert scored == list(range(56, 56 + len(scored))) and scored[-1] >= 1000 - 17
    assert (windows.tokens[:, 0] == np.arange(windows.n_windows) * 16).all()
    # A BOS stands before the text, and before no other window.
    first = strided_windows(ids, n_ctx=64, stride=16, bos_id=7).tokens[:2, 0].tolist()
    assert first == [7, 15]
    assert len(cut_windows(ids, n_ctx=64).tokens) == 15
    with pytest.raises(CorpusError, match="stride"):
        strided_windows(ids, n_ctx=64, stride=64)


def test_a_stride_is_that_of_a_real_engine(tmp_path: Path) -> None:
    """llama-perplexity of llama.cpp b10605, -c 384 -b 384 --ppl-stride 256 -fa off, on this file and text."""
    tiny = write_tiny(tmp_path)
    asked = ("-m", str(tiny.model), "-f", str(tiny.text), "--stride", "256", "--out", str(tmp_path / "run"))
    done = verify(*BASE[:-4], "-c", "384", "--chunks", "4", *asked)
    assert done.returncode == 0, done.stderr
    running = [float(x) for x in re.findall(r"\[\d+\]([\d.]+),", done.stdout)]
    engine = [13049513163235832.0, 30501929289230088.0, 41330339067087200.0, 49052223323130064.0]
    # Of random weights: 37 to 38 nats a token, so 1e-4 of the perplexity is 3e-6 of that.
    assert running == pytest.approx(engine, rel=1e-4)


def test_standard_input_is_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = write_tiny(tmp_path)
    done = {}
    for name in (str(tiny.text), "-"):
        monkeypatch.setattr(corpora, "_STANDARD_INPUT", [])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(tiny.text.read_bytes())))
        out = tmp_path / f"run{len(done)}"
        ran = verify(*BASE, "-m", str(tiny.model), "-f", name, "--stride", "32", "--out", str(out))
        assert ran.returncode == 0, ran.stderr
        done[name] = json.loads((out / "run.json").read_text())["rows"][0]
    assert done["-"]["ppl"] == done[str(tiny.text)]["ppl"] and done["-"]["text"] == "standard input"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_by_name(encoding: str) -> None:
    with pytest.raises(CorpusError, match=r"expected UTF-8, found UTF-16: convert it with iconv -f UTF-16"):
        corpus_from_bytes("plain letters\n".encode(encoding), name="text", source="file")
    assert corpus_from_bytes(b"plain letters\n", name="text", source="file").n_bytes == 14


def test_this_programs_own_code_is_a_text() -> None:
    assert "import" in load_corpus("own-code").text and load_corpus("own-code").source == "file"


def interrupt_at(patch: pytest.MonkeyPatch, module: Any, name: str, at: int) -> None:
    """Ctrl-C in the call number `at` of a function."""
    plain, calls = getattr(module, name), itertools.count()

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    patch.setattr(module, name, interrupted)


# Before anything is finished; in the first model; in the second; while the report is written.
CUTS = [(only, "_group", 0), (only, "_group", 2), (only, "_group", 6), (writing, "write_reports", 0)]


@pytest.mark.parametrize(("module", "name", "at"), CUTS, ids=["first", "model 1", "model 2", "report"])
def test_an_interrupted_run_goes_on(
    module: Any, name: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = write_tiny(tmp_path)
    other = write_tiny_model(tmp_path / "other.gguf", seed=5)
    asked = (*BASE, "-m", str(tiny.model), "-m", str(other), "-f", str(tiny.text), "--memory", "20K")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert verify(*asked, "--out", str(whole)).returncode == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, module, name, at)
        stopped = verify(*asked, "--out", str(cut))
    assert (stopped.returncode, "Traceback" in stopped.stderr) == (130, False)
    if (module, at) == (only, 0):
        assert "verify: interrupted\n" in stopped.stderr and not cut.exists()
        return
    assert f"go on with: verify ppl --resume {cut}" in stopped.stderr
    table = tmp_path / "t.md"
    kept = sorted(one.name for one in (cut / "groups").iterdir())
    with monkeypatch.context() as patch:
        # What is kept is not run again.
        interrupt_at(patch, only, "_group", 8 - len(kept))
        done = verify("ppl", "--resume", str(cut), "--md", str(table))
    assert done.returncode == 0 and table.is_file(), done.stderr
    assert not (cut / "groups").exists() and (cut / "report.html").is_file()
    runs = [json.loads((folder / "run.json").read_text()) for folder in (whole, cut)]
    assert runs[0]["rows"] == runs[1]["rows"] and runs[0]["again"] == runs[1]["again"]
    assert runs[1]["notes"] == []
    assert_refused(verify("ppl", "--resume", str(cut)), "finished")


@pytest.mark.slow
def test_what_a_folder_of_another_model_or_kernel_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = write_tiny(tmp_path)
    kernel = tmp_path / "mine.py"
    kernel.write_text((Path(__file__).parents[2] / "support/user_kernels.py").read_text())
    spec, cut = f"py:{kernel}::good", tmp_path / "cut"
    with monkeypatch.context() as patch:
        interrupt_at(patch, only, "_group", 1)
        asked = (*BASE, "-m", str(tiny.model), "-f", str(tiny.text), "--memory", "20K", "--only", spec)
        assert verify(*asked, "--out", str(cut)).returncode == 130
    go_on = ("ppl", "--resume", str(cut))
    assert_refused(verify(*go_on), "name it again with --only")
    assert_refused(verify(*go_on, "--only", "exact"), f"that run is of --only {spec}")
    assert_refused(verify(*go_on, "--only", spec, "-c", "32"), "expected no --ctx-size")
    kernel.write_text(kernel.read_text() + "\n")
    assert_refused(verify(*go_on, "--only", spec), "changed since the run began")
    kernel.write_text(kernel.read_text()[:-1])
    write_tiny_model(tiny.model, seed=9)
    assert_refused(verify(*go_on, "--only", spec), "is of another model, text or kernel")
    (cut / "groups/000-00000.parquet").write_bytes(b"nothing")
    assert_refused(verify(*go_on, "--only", spec), "000-00000.parquet of groups cannot be read")


def test_options_of_a_comparison_are_refused(tmp_path: Path) -> None:
    text = str(write_text(tmp_path / "t"))
    assert_refused(verify("ppl", "--only", "exact", "--candidate", "eager"), "--candidate", "no --only")
    assert_refused(verify("ppl", "--stride", "8"), "--stride 8", "--only SPEC")
    assert_refused(verify(*BASE, "--stride", "64"), "--stride 64", "1 to 63")
    assert_refused(verify(*BASE, "-f", text, "--csv", str(tmp_path)), "--csv", "folder")
    assert_refused(verify("ppl", "--only", "exakt", "-m", "hf:a/b/c.gguf"), "did you mean 'exact'")


def test_a_long_run_is_foretold_once_and_a_short_one_is_not() -> None:
    seconds = iter([0.0, 1.0, 8.5, 9.0])
    told = Foretelling(lambda: next(seconds))
    told.begins(4)
    assert told.said(4.1, 100) is None
    # What the first step took is no measure of the others: 7.5 s for 0.4 windows, and 95.5 are left.
    assert told.said(4.5, 100) == "about 19 s a window, 30 minutes in all"
    assert told.said(4.6, 100) is None
    short = Foretelling(iter([0.0, 1.0, 4.0]).__next__)
    short.begins(0)
    assert short.said(0.5, 4) is None
    assert short.said(1.0, 4) is None
    several = Foretelling(iter([0.0, 20.0, 26.0]).__next__, of="all of 1 of 3")
    several.begins(0)
    assert several.said(1 / 60, 2) is None
    assert several.said(2 / 60, 2) == "about 6 minutes a window, 12 minutes in all of 1 of 3"
