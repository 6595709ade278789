from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from support.cli import assert_refused, verify
from support.engine import write_engine


@pytest.fixture
def given(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "text").write_bytes(bytes(i * 7 % 251 for i in range(400)))
    options = ("-m", str(tmp_path / "model.gguf"), "-f", str(tmp_path / "text"), "-c", "32", "--chunks", "4")
    return (*options, "--work", str(tmp_path / "work"))


def run(a: Path | str, b: Path | str, *more: str) -> tuple[int, dict[str, Any], str]:
    done = verify("engines", "--a", str(a), "--b", str(b), "--json", *more)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_two_builds_that_agree_and_two_that_do_not(tmp_path: Path, given: tuple[str, ...]) -> None:
    a, same, other = (
        write_engine(tmp_path / name, noise=noise) for name, noise in (("a", 0), ("b", 0), ("c", 2000))
    )
    code, found, said = run(a, same, *given)
    assert (code, found["verdict"]) == (0, "identical")
    assert [e["name"] for e in found["engines"]] == ["A", "B"]
    assert found["engines"][0]["command"][9:13] == ["-b", "1", "-ub", "1"]
    assert "n_kv 17 to 31 are scored" in said
    assert (tmp_path / "work" / "run.json").is_file()
    code, found, said = run(a, other, *given)
    assert (code, found["verdict"]) == (3, "inconclusive")
    assert "====== KL divergence statistics ======" in said
    assert run(a, other, *given, "--max-kld", "1e-9")[:1] == (1,)
    # The first build's logits spare its run: what a bisection needs.
    code, found, said = run(tmp_path / "work" / "a.kld", other, *given, "--max-kld", "10")
    assert (code, [e["name"] for e in found["engines"]]) == (0, ["B"])


def test_options_of_one_build_alone(tmp_path: Path, given: tuple[str, ...]) -> None:
    a = write_engine(tmp_path / "a")
    program = a / "bin" / "llama-perplexity"
    _, found, _ = run(program, a, *given, "--args", "-ngl 99", "--args-b", "--seed 1")
    assert [e["command"][15:] for e in found["engines"]] == [["-ngl", "99"], ["-ngl", "99", "--seed", "1"]]
    assert found["verdict"] == "inconclusive"


@pytest.mark.parametrize(
    ("kind", "said", "last"),
    [
        ("fails half-way", "B ended with exit code 3", "illegal memory access"),
        ("dies", "B died of signal SIGSEGV", "ggml_cuda error"),
        ("stops half-way", "left no whole logits file", "[3]12.3456"),
    ],
)
def test_a_failing_build_is_shown_with_its_own_last_lines(
    tmp_path: Path, given: tuple[str, ...], kind: str, said: str, last: str
) -> None:
    a, b = write_engine(tmp_path / "a"), write_engine(tmp_path / "b", kind)
    code, found, shown = run(a, b, *given)
    assert (code, found["verdict"]) == (1, "broken")
    assert said in found["reasons"][0]
    assert any(line.startswith("B |") and last in line for line in shown.splitlines()), shown
    assert (tmp_path / "work" / "a.kld").is_file(), "what was computed is kept"
    # Nothing can be said about B where A fails.
    code, found, shown = run(b, a, *given)
    assert (code, found["verdict"]) == (3, "inconclusive")
    assert any(line.startswith("A |") and last in line for line in shown.splitlines())


def test_a_build_that_hangs_is_ended_at_the_limit(tmp_path: Path, given: tuple[str, ...]) -> None:
    a, b = write_engine(tmp_path / "a"), write_engine(tmp_path / "b", "hangs")
    started = time.monotonic()
    code, found, _ = run(a, b, *given, "--time-limit", "2")
    assert time.monotonic() - started < 60
    assert (code, found["reasons"]) == (1, ["B was stopped at the time limit of 2 s"])


def test_other_tokens_show_the_first_difference(tmp_path: Path, given: tuple[str, ...]) -> None:
    a, b = write_engine(tmp_path / "a"), write_engine(tmp_path / "b", "other tokens")
    done = verify("engines", "--a", str(a), "--b", str(b), *given)
    assert_refused(done, "b.kld: token 3 of window 2 is", "1 of 128 tokens differ")


def test_bad_input(tmp_path: Path, given: tuple[str, ...]) -> None:
    a = write_engine(tmp_path / "a")
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    cut = tmp_path / "cut.kld"
    cut.write_bytes(b"_logits_")
    for b, said in (
        (tmp_path / "none", "none: no such file or folder"),
        (plain, "plain: cannot be run"),
        (empty, "empty: no llama-perplexity there"),
        (cut, "cut.kld: ends after 8 bytes"),
    ):
        assert_refused(verify("engines", "--a", str(a), "--b", str(b), *given), said)
    both = ("engines", "--a", str(a), "--b", str(a))
    for more, said in (
        (("--chunks", "0"), "--chunks 0"),
        (("-c", "2"), "-c 2"),
        (("--time-limit", "0"), "--time-limit 0"),
        (("--max-kld", "-1"), "--max-kld -1"),
        (("--args", "'"), "no closing quotation"),
        (("-f", "none.txt"), "-f none.txt: no such file"),
        (("--work", str(plain / "x")), "cannot be written"),
    ):
        assert_refused(verify(*both, *given, *more), said)
    assert_refused(verify("engines", "--a", str(a)), "Missing option")


def test_a_logits_file_that_a_run_would_overwrite_is_refused(tmp_path: Path, given: tuple[str, ...]) -> None:
    a, b = write_engine(tmp_path / "a"), write_engine(tmp_path / "b", noise=2000)
    run(a, b, *given)
    kept = tmp_path / "work" / "b.kld"
    before = kept.read_bytes()
    assert_refused(verify("engines", "--a", str(kept), "--b", str(a), *given), "--a", "another --work")
    assert kept.read_bytes() == before


def test_a_logits_file_of_other_windows_is_refused_before_the_other_build_runs(
    tmp_path: Path, given: tuple[str, ...]
) -> None:
    a = write_engine(tmp_path / "a")
    run(a, a, *given)
    kept = tmp_path / "work/a.kld"
    for more in (("-c", "16"), ("--chunks", "3")):
        done = verify(
            "engines", "--a", str(kept), "--b", str(a), *given, *more, "--work", str(tmp_path / "w")
        )
        assert_refused(done, "holds 4 windows of 32 tokens", "got")
    assert not (tmp_path / "w").exists()
