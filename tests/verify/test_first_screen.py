"""What somebody meets who types `verify` for the first time, and what typical mistakes are answered with."""

from __future__ import annotations

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
        (("help", "pplx"), "help pplx: expected a command or `verdicts`"),
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
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    done = verify(*arguments)
    assert_refused(done)
    assert said.lower() in done.stderr.lower()


def test_an_option_that_may_be_repeated_still_may() -> None:
    done = verify("ppl", "--candidate", "eager", "--candidate", "eager:kv=2", "-m", "no-such.gguf")
    assert_refused(done, "no-such.gguf")
