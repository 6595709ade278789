"""The worker's answers: limits in time and size, and nothing that a kernel writes there harms us."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.cli import verify
from support.problems import problem
from verify.kernels.errors import KernelFailure, SpecError
from verify.kernels.kernel import Kernel
from verify.kernels.registry import build_kernel

# A kernel that does what a file beside it says. Its descriptors of the protocol are on the command line.
ANY = """
import json, os, signal, sys, time, torch
HERE = os.path.dirname(os.path.abspath(__file__))
answers, shared = int(sys.argv[2]), int(sys.argv[3])
class Mute(Exception):
    def __str__(self):
        raise ValueError
def attend(q, k, v, *, kv_len, scale):
    exec(open(os.path.join(HERE, "body")).read(), globals())
    return q
"""


ODD_ANSWERS = (
    '{"failure": "raised"}',
    "17",
    "[]",
    "null",
    '{"failure": 3}',
    '{"failure": [[]], "message": "x"}',
    '{"failure": null}',
    '{"dtype": []}',
    '{"lse": "no"}',
    "{",
    "[" * 100_000,
    '{"failure": "hung", "message": ""}',
)


def slow(*values: str) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    folder = tmp_path_factory.mktemp("kernel")
    (folder / "any.py").write_text(ANY)
    built = build_kernel(f"py:{folder / 'any.py'}::attend,timeout=4")
    yield built
    built.close()


def ask(kernel: Kernel, body: str) -> KernelFailure:
    kernel.forgive()
    (kernel.file.parent / "body").write_text(body)  # type: ignore[attr-defined]
    with pytest.raises(KernelFailure) as failed:
        kernel.run(problem(rows=5))
    assert len(str(failed.value)) < 2500
    return failed.value


def test_an_answer_that_trickles_is_timed_out(kernel: Kernel) -> None:
    found = ask(kernel, "while True: os.write(answers, b'.'); time.sleep(0.1)")
    assert found.kind == "hung" and "no answer within 4 s" in str(found)


def test_output_without_end_is_timed_out(kernel: Kernel) -> None:
    assert ask(kernel, "while True: os.write(1, b'x' * 65536)").kind == "hung"


def test_an_answer_without_end_is_cut(kernel: Kernel) -> None:
    found = ask(kernel, "while True: os.write(answers, b'.' * 65536)")
    assert found.kind == "died" and "answered with more than" in str(found)


def test_a_text_of_20_megabytes_costs_neither_time_nor_memory(kernel: Kernel) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = ask(kernel, "raise RuntimeError('long ' * 4_000_000)")
    assert found.kind == "raised" and "long long" in str(found)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize("written", [*map(slow, ODD_ANSWERS[1:]), ODD_ANSWERS[0]])
def test_what_is_no_answer_is_said_to_be_none(kernel: Kernel, written: str) -> None:
    found = ask(kernel, f"os.write(answers, {written!r}.encode() + b'\\n'); time.sleep(60)")
    assert found.kind == "died" and "is no answer" in str(found)


@pytest.mark.parametrize(
    "written", ["{}", *map(slow, ('{"takes": 3, "left_out": {}}', "[]", '{"failure": [[]]}'))]
)
def test_a_greeting_that_is_none_is_no_kernel(tmp_path: Path, written: str) -> None:
    line = (
        f"import os, sys, time\nos.write(int(sys.argv[2]), {written!r}.encode() + b'\\n')\ntime.sleep(60)\n"
    )
    (tmp_path / "any.py").write_text(line)
    with pytest.raises(SpecError, match="is no answer"):
        build_kernel(f"py:{tmp_path / 'any.py'}::attend")


def test_a_shared_file_cut_short_is_the_kernels_fault_and_not_our_end(kernel: Kernel) -> None:
    found = ask(kernel, "os.ftruncate(shared, 64); os.write(answers, b'{\"lse\": true}\\n'); time.sleep(60)")
    assert found.kind == "wrote-inputs"


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("SystemExit(3)", "SystemExit: 3"),
        ("KeyboardInterrupt()", "KeyboardInterrupt"),
        ("Mute()", "Mute: (its text cannot be had)"),
        ("RuntimeError('half \\ud800')", "half \\ud800"),
        ("RuntimeError('\\x1b]0;owned\\x07\\x1b[2J')", "\\x1b]0;owned\\x07\\x1b[2J"),
        ("RuntimeError('turned \\u202e back')", "turned \\u202e back"),
        ("RuntimeError('two\\nlines')", "two lines"),
    ],
)
def test_what_was_raised_is_said_and_fit_to_be_shown(kernel: Kernel, raised: str, said: str) -> None:
    found = ask(kernel, f"raise {raised}")
    assert found.kind == "raised" and said in str(found)


def test_a_librarys_last_words_are_in_the_message(kernel: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(kernel, "os.write(2, b'CUDA error: illegal access\\n' + b'a frame\\n' * 500); os.abort()")
    assert found.kind == "died"
    assert str(found) == "attend: its process was killed by SIGABRT: CUDA error: illegal access"
    assert len(capsys.readouterr().err.splitlines()) < 60


def test_escapes_of_a_kernel_reach_no_terminal(tmp_path: Path) -> None:
    (tmp_path / "any.py").write_text(ANY)
    (tmp_path / "body").write_text("print('\\x1b[2J'); raise RuntimeError('\\x1b]0;owned\\x07 \\ud800')")
    spec = f"py:{tmp_path / 'any.py'}::attend"
    words = ("--shape", "4/2x32", "--n-kv", "64", "--inputs", "gaussian", "--device", "cpu")
    done = verify("diff", *words, "--candidate", spec, "--baseline", "eager", "--out", str(tmp_path / "run"))
    assert done.returncode == 1, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    for report in ("run.json", "report.md", "report.html"):
        assert "\x1b" not in (tmp_path / "run" / report).read_text()
