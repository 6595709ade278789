"""What somebody meets who types `verify` for the first time, and what typical mistakes are answered with."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from support.cli import assert_refused, verify
from verify.commands import COMMANDS, load
from verify.commands.help_pages import ENGINE_OPTIONS, EXAMPLES, GROUPS, group_of
from verify.judge.verdict import EXIT_CODES
from verify.judge.words import VERDICTS, next_line
from verify.machine.exits import EXIT_VOID


def test_verify_alone_is_the_help() -> None:
    alone = verify()
    assert alone.returncode == 0 and not alone.stderr
    assert alone.stdout == verify("--help").stdout == verify("-h").stdout == verify("help").stdout
    for name in COMMANDS:
        assert f"\n  {name} " in alone.stdout


def test_the_version_is_the_packages() -> None:
    from verify import __version__

    assert verify("--version").stdout == f"verify {__version__}\n"


def test_a_page_on_verdicts_and_their_exit_codes() -> None:
    page = verify("help", "verdicts")
    assert page.returncode == 0
    for name, code in {**EXIT_CODES, "void": EXIT_VOID}.items():
        assert VERDICTS[name].code == code
        assert f"{name} (exit code {code})" in page.stdout
        assert VERDICTS[name].next_step in next_line(VERDICTS[name])
    assert set(VERDICTS) == {*EXIT_CODES, "void"}
    assert max(map(len, page.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_help_of_a_command_is_the_same_by_three_ways(name: str) -> None:
    shown = verify(name, "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("Usage:")
    assert verify(name, "-h").stdout == shown.stdout
    if name != "help":
        assert verify("help", name).stdout.split("\n", 1)[1] == shown.stdout.split("\n", 1)[1]
    for line in EXAMPLES.get(name, ()):
        assert line in shown.stdout


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_are_command_lines_that_exist(name: str) -> None:
    """Every option of an example is one of its command."""
    options = {word for param in load(name).params for word in (*param.opts, *param.secondary_opts)}
    for line in EXAMPLES[name]:
        words = line.split()
        assert words[:2] == ["verify", name]
        assert {w.split("=")[0] for w in words if w.startswith("-") and not w[1].isdigit()} <= options | {
            "-fa"
        }


def test_options_stand_under_what_they_are_for() -> None:
    by = {max(p.opts, key=len): group_of(p) for p in load("ppl").params}
    assert by["--file"] == "Input" and by["--candidate"] == "Kernels" and by["--margin"] == "Measuring"
    assert by["--gpus"] == "Reproducing engines" and by["--out"] == "Output"
    shown = verify("ppl", "--help").stdout
    assert [shown.index(f"\n{title}:\n") for title in GROUPS] == sorted(
        shown.index(f"\n{title}:\n") for title in GROUPS
    )


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files that are not what they are given as."""
    base = tmp_path_factory.mktemp("mistaken")
    for name, content in {
        "short.txt": b"hello", "empty.txt": b"", "wide.txt": "plain".encode("utf-16-le"),
        "latin.txt": b"caf\xe9 au lait", "not.gguf": b"{}", "folder/x": b"x", "list.json": b"[1, 2]",
        "half.py": b"def attend(q:\n", "lines.jsonl": b'{"a": 1}\nno record\n',
        "huge.gguf": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60),
    }.items():  # fmt: skip
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    os.mkfifo(base / "pipe")
    return base


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ppl", "-ngl", "99"), ENGINE_OPTIONS["-ngl"]),
        (("ppl", "-fa", "on"), ENGINE_OPTIONS["-fa"]),
        (("ppl", "--kl-divergence"), "verify kld"),
        (("gen", "-t", "8"), "OMP_NUM_THREADS"),
        (("ppl", "-m", "a.gguf", "-m", "b.gguf"), "--model: given more than once"),
        (("ppl", "-f", "a", "--file", "b"), "--file: given more than once"),
        (("ppl", "--memory", "8"), "--memory 8: expected a unit, such as 8G"),
        (("ppl", "--memory", "8Q"), "--memory 8Q"),
        (("pplx",), "Did you mean 'ppl'"),
        (("help", "pplx"), "help pplx: expected a command, `verdicts` or `words`"),
        (("ppl", "--candidat", "flash"), "--candidate"),
        (("ppl", "--chunks", "many"), "many"),
        (("ppl", "-c", "0"), "-c 0: expected at least 4 tokens"),
        (("ppl", "--chunks", "0"), "--chunks 0: expected windows from 1"),
        (("ppl", "-m", "no-such.gguf"), "no-such.gguf"),
        (("ppl", "--path", "sideways"), "sideways"),
        (("ppl", "--margin", "0.5"), "margin"),
        (("diff", "--shape", "no-such-model"), "no-such-model"),
        (("diff", "--candidate", "flish"), "flish"),
        (("diff", "--candidate", "flash:kv=none"), "kv=none"),
        (("props", "py:no-such-file.py::f"), "no-such-file.py"),
        (("bench", "flash", "--n-kv", "none"), "none"),
        (("kld",), "BASE"),
        (("kld", "no-such.kld", "other.kld"), "no-such.kld"),
        (("sweep", "no-such.md", "other.md"), "no-such.md"),
        (("report", "no-such-run"), "no-such-run"),
        (("plan", "--arch", "no-such-arch"), "no-such-arch"),
        (("explain",), "--texts"),
        # Nothing is fetched before what can be refused without it.
        (("ppl", "-m", "hf:a/b/c.gguf", "--candidate", "flish"), "did you mean 'flash'"),
        (("ppl", "-m", "hf:a/b/c.gguf", "-f", "no-such.txt"), "no-such.txt: file: expected a text file"),
        (("ppl", "-m", "hf:a/b/c.gguf", "--out", "."), "--out .: holds other files"),
        (("ppl", "-m", "hf:a/b"), "expected hf:ORG/REPO/FILE.gguf"),
        (("ppl", "-m", "not.gguf"), "not.gguf: is not a GGUF file"),
        (("ppl", "-m", "folder"), "expected a GGUF file, found a folder"),
        (("ppl", "model.gguf"), "a model is given with -m model.gguf"),
        (("ppl", "-f", "empty.txt"), "empty.txt: text: expected at least one character"),
        (("ppl", "-f", "wide.txt"), "found UTF-16: convert it with iconv"),
        (("ppl", "-f", "latin.txt"), "expected UTF-8, found byte 0xe9 at byte offset 3"),
        (("ppl", "-f", "folder"), "expected a text file, found a folder"),
        (("ppl", "-f", "short.txt"), "expected at least 1024 (2 * n_ctx, n_ctx = 512)"),
        (("ppl", "--corpus", "wikitext"), "expected wikitext-2, wikitext-103, c4, own-code"),
        (("ppl", "-c", "8k"), "8k are -c 8192"),
        (("ppl", "--candidate", "flash:heads=8,4"), "'4' is not of the form option=value"),
        (("ppl", "--candidate", "py:mine.py"), "expected py:FILE.py::FUNCTION"),
        (("ppl", "--baseline", "exact:acc=f16"), "expected one of float64"),
        (("ppl", "--cache-type", "q8"), "did you mean 'q8_0'"),
        (("ppl", "--device", "gpu"), "--device gpu: expected cpu, cuda or cuda:N"),
        (("ppl", "--resume", "folder"), "expected the folder of a run"),
        (("ppl", "--min-coverage", "2"), "expected a share from 0 to 1"),
        (("ppl", "--score-last", "600"), "expected 1 to 511 positions"),
        (("ppl", "--noise", "1"), "expected 0 (none) or at least 2 arms"),
        (("ppl", "--save-logits", "folder"), "is a folder, expected the name of a file"),
        (("ppl", "--chunks", "-2"), "expected windows from 1, or -1 for all"),
        (("ppl", "--csv", "t.csv"), "expected --only SPEC beside it"),
        (("ppl", "--only", "flish"), "did you mean 'flash'"),
        (("ppl", "--only", "exact", "--path", "both"), "expected decode or prefill"),
        (("gen",), "expected a prompt"),
        (("gen", "-p", "x", "-n", "0"), "-n 0: expected at least 1 token"),
        (("diff", "--n-kv", "512;1024"), "expected lengths from 1, comma between"),
        (("diff", "--inputs", "gausian"), "--inputs gausian: expected all or any of"),
        (("diff", "--shape", "9/2x64"), "9 query heads do not divide among 2"),
        (("diff", "--dtype", "float16"), "expected one of f16, bf16, f32"),
        (("diff", "--path", "prefil"), "expected decode, several or prefill"),
        (("props", "flash", "--law", "no-law"), "unknown law"),
        (("props", "flash", "--case", "{}"), "needs the --law"),
        (("judge",), "file"),
        (("judge", "short.txt"), "short.txt: expected a kernel, found no function and no class"),
        (("identify", "flish"), "did you mean 'flash'"),
        (("identify", "eager", "--regimes", "some"), "expected quick or full"),
        (("kld", "not.gguf", "short.txt"), "not a logits file"),
        (("sweep", "short.txt"), "it has no table"),
        (("sweep", "short.txt", "--policy", "ik-1183"), "expected both or neither"),
        (("report", "folder"), "no run.json there"),
        (("logits", "-f", "short.txt", "--out", "x.txt"), "expected a file that ends in .npz"),
        (("list", "--kernels"), "No such option"),
        (("--verison",), "--version"),
        # As a stranger would: other kinds of files, numbers that no machine holds, what is not there.
        (("judge", "folder"), "folder: expected a file of Python, found a folder"),
        (("judge", "list.json"), "expected an object, a definition or a solution"),
        (("judge", "half.py"), "half.py: is no Python: '(' was never closed"),
        (("kld", "pipe", "pipe"), "pipe: is a pipe, expected a file"),
        (("kld", "folder", "folder"), "folder: cannot be read: Is a directory"),
        (("logprobs", "lines.jsonl", "lines.jsonl"), "line 2 is not whole JSON: expected a record a line"),
        (("logprobs", "empty.txt", "empty.txt"), "empty.txt: is empty"),
        (("explain", "--texts", "list.json"), "requires 2 arguments"),
        (("explain", "--logits", "empty.txt", "empty.txt"), "not a logits file"),
        (("diff", "--n-kv", "9" * 20, "--shape", "12/2x64"), "are free on"),
        (("diff", "--shape", "0/0x0"), "expected heads and head sizes from 1"),
        (("diff", "--rows", "-1"), "--rows -1: expected at least 2"),
        (("diff", "--margin", "nan"), "--margin nan: expected a ratio above 1"),
        (("diff", "--against-stored", "empty.txt"), "expected what --store wrote"),
        (("diff", "--store", "folder"), "is a folder, expected the name of a file"),
        (("diff", "--captured-from", "folder"), "no captured layers there"),
        (("props", "eager", "--junit", "folder"), "--junit folder: is a folder"),
        (("props", "ggml:lib=no-such.so"), "no-such.so: no such file"),
        (("bench", "flash", "--n-kv", "1" + "0" * 13), "are free on"),
        (("plan", "-m", "short.txt"), "is not a GGUF file"),
        (("plan", "--shape", "glm-4.5-air", "--gpus", "0"), "--gpus 0: expected at least 1"),
        (
            ("engines", "--a", "no", "--b", "no", "-m", "not.gguf", "-f", "short.txt"),
            "no such file or folder",
        ),
        (("ladder", "-m", "huge.gguf", "-f", "short.txt"), "the header is broken, or cut off"),
        (("logits", "-f", "short.txt", "-n", "0", "--out", "x.npz"), "-n 0: expected at least 1"),
        (("report", "short.txt"), "no run.json there"),
        (("ppl", "--resume", "short.txt"), "expected the folder of a run"),
        (("tolerance", "eager", "--n-kv", "-5"), "--n-kv -5"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, mistaken: Path
) -> None:
    monkeypatch.chdir(mistaken)
    done = verify(*arguments)
    assert_refused(done)
    assert said.lower() in done.stderr.lower()


def test_an_option_that_may_be_repeated_still_may() -> None:
    done = verify("ppl", "--candidate", "eager", "--candidate", "eager:kv=2", "-m", "no-such.gguf")
    assert_refused(done, "no-such.gguf")
