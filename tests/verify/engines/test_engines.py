from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from support.cli import assert_refused, verify
from support.engine import write_engine
from verify.engines.builds import ask, find_program, unknown_options


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
    # It hung while it loaded.
    assert code == 3
    assert found["reasons"][0].startswith("B was stopped at the time limit of 2 s before its first window")
    b = write_engine(tmp_path / "c", "hangs in a window")
    code, found, _ = run(a, b, *given, "--time-limit", "2")
    assert code == 1
    assert found["reasons"][0].startswith("B was stopped at the time limit of 2 s: perplexity: calculating")


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("correct", ("--args-b", "-ngl 99 --no-such-thing"), "error: invalid argument: --no-such-thing"),
        ("out of memory", (), "cudaMalloc failed: out of memory"),
        ("out of memory in a window", (), "CUDA error: out of memory"),
        ("no library", (), "libggml.so: cannot open shared object file"),
    ],
)
def test_what_ends_before_the_first_window_says_nothing_about_attention(
    tmp_path: Path, given: tuple[str, ...], kind: str, more: tuple[str, ...], said: str
) -> None:
    a, b = write_engine(tmp_path / "a"), write_engine(tmp_path / "b", kind)
    code, found, shown = run(a, b, *given, *more)
    assert (code, found["verdict"]) == (3, "inconclusive")
    assert found["reasons"][0].startswith("B ") and said in found["reasons"][0]
    if kind == "no library":
        assert not (tmp_path / "work" / "a.kld").exists(), "both are asked before the first runs"
    if more:
        assert "B: its --help does not name --no-such-thing" in shown


def test_flash_attention_is_written_as_each_build_takes_it(tmp_path: Path, given: tuple[str, ...]) -> None:
    new, old = write_engine(tmp_path / "new"), write_engine(tmp_path / "old", "old")
    for args, expected_new, expected_old in (
        ("-ngl 99 -fa", ["-ngl", "99", "-fa", "on"], ["-ngl", "99", "-fa"]),
        ("-fa on -ngl 99", ["-fa", "on", "-ngl", "99"], ["-fa", "-ngl", "99"]),
        ("-fa off", ["-fa", "off"], []),
    ):
        code, found, shown = run(new, old, *given, "--args", args)
        assert (code, found["verdict"]) == (0, "identical"), shown
        assert [e["command"][15:] for e in found["engines"]] == [expected_new, expected_old]
    assert [e["version"] for e in found["engines"]] == ["version: 4321 (abc1234)"] * 2


@pytest.mark.parametrize(
    ("line", "form"),
    [
        ("-fa,   --flash-attn [on|off|auto]       set Flash Attention use", "value"),
        ("-fa,   --flash-attn                     enable Flash Attention (default: disabled)", "flag"),
        ("  -fa, --flash-attn (auto|on|off|0|1) Flash Attention (default: auto)", "value"),
        ("-fa,   --flash-attn             enable, or AUTO", "flag"),
        ("-f,    --file FNAME                     a file with -fa in it", None),
    ],
)
def test_the_forms_of_the_option_in_helps(tmp_path: Path, line: str, form: str | None) -> None:
    program = tmp_path / "llama-perplexity"
    program.write_text(f"#!/bin/sh\necho '{line}'\necho '-c,  --ctx-size N   tokens'\n")
    program.chmod(0o755)
    build = ask(find_program(str(program)))
    assert build.flash == form
    assert {"-c", "--ctx-size"} <= build.options
    assert unknown_options(["-c", "5", "--threads", "-1"], build) == ["--threads"]


def test_the_unified_program_is_told_which_command(tmp_path: Path, given: tuple[str, ...]) -> None:
    a, b = write_engine(tmp_path / "a"), write_engine(tmp_path / "b", unified=True)
    for build in (b, b / "bin" / "llama"):
        code, found, shown = run(a, build, *given)
        assert (code, found["verdict"]) == (0, "identical"), shown
        assert found["engines"][1]["command"][1] == "perplexity"


def test_several_query_tokens_a_call_and_the_prompts_path(tmp_path: Path, given: tuple[str, ...]) -> None:
    a = write_engine(tmp_path / "a")
    for more, batches, said in (
        (("-ub", "4"), ["-b", "4", "-ub", "4"], "4 query tokens a call (-b 4 -ub 4)"),
        (("--n-q", "2"), ["-b", "2", "-ub", "2"], "2 query tokens a call"),
        (("--mode", "prefill"), [], "hundreds of query tokens a call"),
        (("--mode", "prefill", "--n-q", "64"), ["-b", "64", "-ub", "64"], "64 query tokens a call"),
    ):
        code, found, shown = run(a, a, *given, *more)
        assert (code, found["verdict"]) == (0, "identical")
        assert found["engines"][0]["command"][9 : 9 + len(batches)] == batches
        assert found["engines"][0]["command"][9 + len(batches)] == "--kl-divergence-base"
        assert said in shown


def documented_commands() -> list[str]:
    """Every `verify engines` line of the pages, placeholders and continued lines put together."""
    root = Path(__file__).parents[3]
    found = []
    for page in ("README.md", "docs/commands.md", "docs/working-with-engines.md"):
        text = (root / page).read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"^ +(verify engines .*?)\s*$", text, re.MULTILINE)
        found += re.findall(r"^ +(llama-perplexity .*?)\s*$", text, re.MULTILINE)
    return found


def test_the_pages_own_command_lines_are_taken_by_the_program(
    tmp_path: Path, given: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = documented_commands()
    assert len(lines) >= 4, lines
    (tmp_path / "wiki.test.raw").write_bytes((tmp_path / "text").read_bytes() * 200)
    monkeypatch.chdir(tmp_path)
    for i, line in enumerate(lines):
        words = shlex.split(line)
        if words[0] == "llama-perplexity":
            program = write_engine(tmp_path / f"p{i}") / "bin/llama-perplexity"
            chunks = ("-c", "32", "--chunks", "2")
            done = subprocess.run([program, *words[1:], *chunks], capture_output=True, text=True, check=False)
            assert done.returncode == 0, (line, done.stderr)
            continue
        # Builds are stand-ins, one new, one old; windows are short. All else is as the page has it.
        for at, kind in (("--a", "correct"), ("--b", "old")):
            words[words.index(at) + 1] = str(write_engine(tmp_path / f"{i}{at}", kind))
        for at in ("-c", "--chunks"):
            if at in words:
                words[words.index(at) + 1] = "32" if at == "-c" else "2"
        words[words.index("-f") + 1] = "wiki.test.raw"
        Path(words[words.index("-m") + 1]).write_bytes(b"GGUF")
        done = verify(*words[1:], *(("-c", "32") if "-c" not in words else ()))
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        assert "verdict: identical" in done.stdout


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
        (("--mode", "fast"), "--mode fast: expected decode or prefill"),
        (("-ub", "0"), "--n-q 0: expected query tokens from 1"),
        (("--max-kld", "-1"), "--max-kld -1"),
        (("--args", "'"), "no closing quotation"),
        (("--work", str(plain / "x")), "cannot be written"),
    ):
        assert_refused(verify(*both, *given, *more), said)
    without = [word for i, word in enumerate(given) if "-f" not in given[max(i - 1, 0) : i + 1]]
    assert_refused(verify(*both, *without, "-f", "none.txt"), "-f none.txt: no such file")
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
