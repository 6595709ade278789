"""--save-logits and --against on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from support.cli import assert_refused, verify
from support.logits_files import decode
from support.tiny_model import write_text, write_tiny_model
from verify.engines.logits_file import LogitsFile, LogitsWriter
from verify.ppl.engine_logits import cause_of_distance

SCORED, VOCABULARY = 31, 259


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, a run of 3 windows of 64 and its logits."""
    folder = tmp_path_factory.mktemp("referee")
    write_tiny_model(folder / "tiny.gguf")
    write_text(folder / "text")
    run(folder, "run", "--save-logits", str(folder / "exact.kld"), "--memory", "1K")
    return folder


def run(folder: Path, out: str, *more: str) -> dict[str, Any]:
    done = verify(*command(folder, out), *more)
    assert done.returncode in (0, 1, 3), done.stderr
    found: dict[str, Any] = json.loads((folder / out / "run.json").read_text())
    return found


def command(folder: Path, out: str) -> tuple[str, ...]:
    return (
        *("ppl", "-m", str(folder / "tiny.gguf"), "-f", str(folder / "text"), "-c", "64", "--chunks", "3"),
        *("--device", "cpu", "--out", str(folder / out)),
    )  # fmt: skip


def test_the_saved_records_are_those_of_exact(saved: Path) -> None:
    n_ctx, n_vocab, n_chunk, tokens, records = decode((saved / "exact.kld").read_bytes())
    assert (n_ctx, n_vocab, n_chunk) == (64, VOCABULARY, 3)
    table = pq.read_table(saved / "run" / "tokens.parquet")
    exact = table.filter(pc.equal(table["arm"].cast("string"), "exact")).sort_by(
        [("window", "ascending"), ("position", "ascending")]
    )
    targets = exact["target"].to_numpy()
    assert [tokens[64 * w + 33 + i] for w in range(3) for i in range(SCORED)] == targets.tolist()
    nll = -np.array([record[t] for record, t in zip(records, targets, strict=True)])
    # This model's logits lie far apart: what is less likely than e^-24 of the largest is clipped.
    truth = exact["nll"].to_numpy()
    clipped = truth > 24
    assert 0.2 < clipped.mean() < 1
    np.testing.assert_allclose(nll[~clipped], truth[~clipped], atol=2.5e-4)
    assert (nll[clipped] >= 24 - 1e-5).all()
    np.testing.assert_array_equal(np.argmax(records, 1), exact["top1"].to_numpy())


def test_an_engine_that_computes_the_same_is_explained_by_the_kernel(saved: Path) -> None:
    found = run(saved, "same", "--against", str(saved / "exact.kld"))
    (engine,) = found["engines"]
    assert engine["cause"] == "kernel"
    assert 0 <= engine["kld"] < 3 * engine["resolution"] < 1e-7
    arm = found["arms"][-1]
    assert (arm["name"], arm["role"], arm["spec"]) == ("engine", "engine", str(saved / "exact.kld"))
    assert engine["said"] in found["notes"]
    assert found["verdict"] == json.loads((saved / "run" / "run.json").read_text())["verdict"]


def wrong(saved: Path, name: str, noise: float) -> Path:
    """The saved file with noise on its logarithms."""
    rng = np.random.default_rng(0)
    with (
        LogitsFile(saved / "exact.kld") as file,
        LogitsWriter(saved / name, file.tokens, VOCABULARY) as writer,
    ):
        for block in file.blocks():
            rows = block.log_probs()
            writer.write(block.window, block.row, rows + noise * rng.normal(size=rows.shape).astype("f4"))
    return saved / name


def test_an_engine_that_is_off_is_the_cause_where_weights_are_plain(saved: Path) -> None:
    path = wrong(saved, "off.kld", 0.1)
    (engine,) = run(saved, "off", "--against", str(path))["engines"]
    assert engine["cause"] == "engine"
    # Noise of variance s^2 on every logarithm: a divergence of s^2 (1 - sum p^2) / 2.
    assert 1e-4 < engine["kld"] < 0.006
    # Beside a file that is right, what was done differently is the cause.
    found = run(saved, "both", "--against", str(path), "--against", str(saved / "exact.kld"))
    assert [e["cause"] for e in found["engines"]] == ["not the kernel", "kernel"]
    assert [e["arm"] for e in found["engines"]] == ["engine-1", "engine-2"]


def test_what_a_file_clips_is_no_distance(saved: Path) -> None:
    """A quarter of the vocabulary or more lies below 8 nats, and would be raised to e^-8 each."""
    path = saved / "narrow.kld"
    with (
        LogitsFile(saved / "exact.kld") as file,
        LogitsWriter(path, file.tokens, VOCABULARY, clip=8) as writer,
    ):
        for block in file.blocks():
            writer.write(block.window, block.row, block.log_probs())
    with LogitsFile(path) as file:
        assert all((block.codes == 0).mean() > 0.25 for block in file.blocks())
    (engine,) = run(saved, "narrow", "--against", str(path))["engines"]
    assert abs(engine["kld"]) < 1e-7


def test_a_text_whose_backslashes_the_engine_expanded_is_recognised(saved: Path) -> None:
    """The engine's file is of the text with line ends in place of backslash and n."""
    escaped = (saved / "text").read_text().replace("\n", "\\n").replace("a", "\\x61")
    (saved / "escaped").write_text(escaped)
    base = [str(saved / "escaped") if part == str(saved / "text") else part for part in command(saved, "no")]
    said = "the engine expanded the backslashes of the text before it cut it into tokens; expected a file of"
    assert_refused(verify(*base, "--against", str(saved / "exact.kld")), said)


def test_files_of_another_text_or_model_are_refused_before_anything_runs(saved: Path) -> None:
    good = str(saved / "exact.kld")
    raw = bytearray(Path(good).read_bytes())
    raw[20 + 4 * 70] ^= 1
    other = saved / "other.kld"
    other.write_bytes(raw)
    base = command(saved, "refused")
    cases = [
        ((*base, "--against", str(other)), "other.kld: token 6 of window 2 is"),
        ((*base, "--against", str(saved / "text")), "expected b'_logits_'"),
        ((*base, "--chunks", "2", "--against", good), "n_chunk is 3, expected 2 as --chunks says"),
        ((*base, "-c", "32", "--against", good), "n_ctx is 64, expected 32 as -c says"),
        ((*base, "--save-logits", str(saved / "no" / "x.kld")), "no/x.kld: no such folder"),
    ]
    for arguments, said in cases:
        assert_refused(verify(*arguments), said)


def test_a_resumed_run_saves_what_is_left(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verify.ppl import experiment
    from verify.ppl.runfolder import RunFolder

    whole = (saved / "exact.kld").read_bytes()
    path = saved / "again.kld"
    done: list[int] = []
    keep = RunFolder.save_group

    def save(self: RunFolder, first: int, result: Any) -> None:
        keep(self, first, result)
        done.append(first)
        if len(done) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(experiment.RunFolder, "save_group", save)
    arguments = (*command(saved, "again"), "--save-logits", str(path), "--memory", "1K")
    assert verify(*arguments).returncode == 130
    assert path.read_bytes() != whole
    done_again = verify("ppl", "--resume", str(saved / "again"), "--save-logits", str(path))
    assert done_again.returncode in (0, 3), done_again.stderr
    assert len(done) > 1
    assert path.read_bytes() == whole


def test_a_baseline_that_failed_says_nothing_of_an_engine() -> None:
    cause, said = cause_of_distance(
        "engine (a.kld)", 1e-3, 1e-6, kernel=math.nan, nearest=1e-3, types=["F32"]
    )
    assert cause == "not known"
    assert "nothing to hold it against" in said
