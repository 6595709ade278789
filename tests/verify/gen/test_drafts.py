"""`verify gen --draft N`: text in calls of some tokens beside text a token a call."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from support.cli import Done, assert_refused, verify
from support.tiny_model import write_tiny_model
from support.tiny_models import TINY
from verify.ppl.record import PathAloneRecord
from verify.rejudge import rejudge_gen
from verify.reports.path_alone import path_alone_sentence
from verify.reports.record import StoredGen, gen_command, load_run

KERNELS = Path(__file__).parents[2] / "support/user_kernels.py"
PROMPT = "the moth sat on that"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("drafts") / "tiny.gguf", seed=3, restless=True)


def gen(tiny: Path, out: Path, *more: str) -> tuple[Done, dict[str, Any]]:
    done = verify(
        "gen", "-m", str(tiny), "-p", PROMPT, "--ignore-eos", "--device", "cpu", "--out", str(out), *more
    )
    return done, json.loads((out / "run.json").read_text())


def texts(run: dict[str, Any]) -> dict[str, str]:
    return {arm["name"]: arm["text"] for arm in run["arms"]}


def test_a_right_kernel_is_lossless_to_the_bit(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done, run = gen(tiny, out, "-n", "10", "--draft", "4", "--candidate", "eager:block=16", "--json")
    assert (done.returncode, run["verdict"]) == (0, "identical"), done.stderr
    assert run["reasons"] == ["every bit is equal, and 100.0% of the tokens went through calls of 4 tokens"]
    (pair,) = run["pairs"]
    assert (pair["path"], pair["coverage"], pair["tokens"], pair["disagreements"]) == ("several", 1.0, 10, [])
    # Ten tokens: two are left over and come first, then twice four; two layers.
    assert (pair["judged_calls"], pair["judged_least"]) == (3 * 2, 3)
    calls = {arm["name"]: arm["calls"] for arm in run["arms"]}
    assert calls["baseline"] == calls["control"] == "calls of one token"
    assert calls["candidate"] == "calls of 4 tokens"
    ran = {
        (line["arm"], line["path"], line["tokens_a_call"]): line["rows"]
        for line in run["coverage"]
        if line["path"] != "prefill"
    }
    single = {(arm, "decode", 1): 2 * 10 for arm in ("baseline", "control")}
    assert ran == single | {("candidate", "several", 2): 2 * 2, ("candidate", "several", 4): 2 * 8}
    (found,) = run["path_alone"]
    assert (found["n_q"], found["tokens"], found["floor_tokens"], found["top1_changes"]) == (4, 10, 10, 0)
    sentence = path_alone_sentence(PathAloneRecord(**found))
    assert sentence.endswith("lossless, greedy text with drafts of 4 is the text without, to the bit")
    assert sentence in done.stderr and sentence in (out / "report.md").read_text()

    # The text is what the kernel writes a token a call, each of its tokens a step.
    _, plain = gen(
        tiny, tmp_path / "plain", "-n", "10", "--baseline", "eager:block=16", "--candidate", "eager"
    )
    assert texts(run)["baseline"] == texts(run)["candidate"] == texts(plain)["baseline"]
    columns = ("n_kv", "token", "target", "top1")
    steps, of_plain = (
        [[row[name] for name in columns] for row in pq.read_table(folder / "tokens.parquet").to_pylist()
         if row["arm"] == "baseline"]
        for folder in (out, tmp_path / "plain")
    )  # fmt: skip
    assert steps == of_plain
    checks = [c for c in pq.read_table(out / "layers.parquet").to_pylist() if c["arm"] == "candidate"]
    assert {(c["call"], c["step"]) for c in checks} == {(-1, -1), *((-(-(i - 1) // 4), i) for i in range(10))}
    n_prompt = run["prompt"]["tokens"]
    assert all(c["n_kv"] == n_prompt + c["step"] for c in checks if c["step"] >= 0)

    stored = load_run(out)
    assert isinstance(stored, StoredGen)
    words = shlex.split(gen_command(stored.run))
    assert words[words.index("--draft") + 1] == "4" and words[words.index("--baseline") + 1] == "own"
    # One kernel in unlike calls is a comparison, by today's rules too.
    (again,) = rejudge_gen(stored.run)
    assert (again.now.verdict, again.now.reasons) == ("identical", run["reasons"])


def test_a_kernel_that_is_wrong_for_four_tokens_writes_another_text(tiny: Path, tmp_path: Path) -> None:
    spec = f"py:{KERNELS}::four_tokens"
    done, run = gen(tiny, tmp_path / "run", "-n", "12", "--draft", "4", "--candidate", spec)
    assert (done.returncode, run["verdict"]) == (1, "broken"), done.stderr
    assert all(reason.startswith("candidate: ") for reason in run["reasons"])
    (pair,), (found,) = run["pairs"], run["path_alone"]
    assert found["top1_changes"] == len(pair["disagreements"]) > 0
    assert (
        sum(one["tie"] is False for one in pair["disagreements"]) == found["top1_changes"] - found["ties"] > 0
    )
    assert pair["first_difference"]["step"] == pair["disagreements"][0]["step"]
    assert "not lossless, greedy text with drafts of 4 is another text" in done.stdout
    assert texts(run)["candidate"] != texts(run)["baseline"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--draft", "1"], "--draft 1: expected 2 to 16 tokens a call"),
        (["--draft", "17"], "--draft 17: expected 2 to 16 tokens a call"),
        (["--draft", "-4"], "--draft -4: expected 2 to 16 tokens a call"),
        (["--draft", "4", "-n", "3"], "--draft 4: expected a text of as many tokens at least, -n is 3"),
        (
            ["--baseline", "own"],
            "--baseline own: is the candidate's own kernel in calls of one token, expected",
        ),
        (["--draft", "4", "--candidate", "eager", "--candidate", "flash"], "expected one --candidate"),
    ],
)
def test_drafts_that_cannot_be_are_refused(tiny: Path, tmp_path: Path, more: list[str], said: str) -> None:
    out = tmp_path / "run"
    assert_refused(verify("gen", "-m", str(tiny), "-p", PROMPT, *more, "--out", str(out)), said)
    assert not out.exists()


def test_a_recurrent_model_has_no_drafts(tmp_path: Path) -> None:
    model = TINY["qwen35"].write(tmp_path / "tiny.gguf", letters=True)
    done = verify("gen", "-m", str(model), "-p", "the moth", "--draft", "2", "--device", "cpu")
    assert_refused(
        done, f"--draft 2: layer 0 of {model} is recurrent, its state cannot be cut back to a token"
    )
