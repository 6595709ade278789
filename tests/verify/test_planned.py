"""`[tool.verify]` and `verify run`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.cli import Done, assert_refused, verify
from verify.machine.errors import UsageError
from verify.planned import find_project, planned_runs

KERNELS = Path(__file__).parents[1] / "support/user_kernels.py"
PROJECT = f"""
[tool.verify]
margin = 1.5
n_kv = [33]
device = "cpu"

[[tool.verify.kernels]]
spec = "py:{KERNELS}::good"
shapes = ["2/1x32"]
inputs = ["gaussian"]
baseline = "flash"
examples = 3
commands = ["diff", "props", "judge", "ppl"]

[[tool.verify.kernels]]
spec = "py:{KERNELS}::last_key_dropped"
shapes = ["2/1x32"]
inputs = ["probes"]

[tool.verify.text]
file = "text.txt"
chunks = 2
"""


def project(folder: Path, text: str = PROJECT) -> Path:
    file = folder / "pyproject.toml"
    file.write_text(text)
    return file


def test_a_project_becomes_command_lines(tmp_path: Path) -> None:
    runs = planned_runs(project(tmp_path))
    assert [run.name for run in runs] == ["1-diff", "1-props", "1-judge", "1-ppl", "2-diff"]
    assert runs[0].words == (
        "diff", "--candidate", f"py:{KERNELS}::good", "--baseline", "flash", "--margin", "1.5", "--shape",
        "2/1x32", "--n-kv", "33", "--inputs", "gaussian", "--device", "cpu",
    )  # fmt: skip
    assert runs[1].words == ("props", f"py:{KERNELS}::good", "--examples", "3", "--device", "cpu")
    assert runs[2].words[:2] == ("judge", f"{KERNELS}::good")
    assert runs[3].words[-6:] == ("-f", "text.txt", "--chunks", "2", "--device", "cpu")


def test_it_is_found_from_a_folder_below(tmp_path: Path) -> None:
    below = tmp_path / "a/b"
    below.mkdir(parents=True)
    (below / "pyproject.toml").write_text("[project]\n")
    file = project(tmp_path)
    assert find_project(below) == file.resolve()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.verify]\n", "expected at least one"),
        ("[tool.verify]\nmargim = 1\n", "unknown key 'margim', did you mean 'margin'?"),
        ("[tool.verify]\nmargin = 'x'\n", "margin = 'x': expected a number"),
        (
            "[[tool.verify.kernels]]\nshapes = ['a']\n",
            "[[tool.verify.kernels]] 1: expected a table with a spec",
        ),
        ("[[tool.verify.kernels]]\nspec = 'flash'\ncommands = ['dif']\n", "'dif', did you mean 'diff'?"),
        ("[[tool.verify.kernels]]\nspec = 'flash'\nn_kv = 3\n", "n_kv = 3: expected a list"),
        ("[tool.verify.text]\nfiel = 'x'\n", "unknown key 'fiel'"),
        ("[tool", "pyproject.toml: "),
    ],
)
def test_a_slip_is_named_by_its_key(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        planned_runs(project(tmp_path, text))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_it_runs_all_and_exits_with_the_gravest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(command: list[str], *, cwd: Path, check: bool) -> Done:
        """As a process of its own would, but for loading torch."""
        assert command[:3] == [sys.executable, "-m", "verify"] and not check
        assert cwd == tmp_path.resolve() == Path.cwd()
        return verify(*command[3:])

    monkeypatch.setattr("verify.commands.run.subprocess", SimpleNamespace(run=here))
    monkeypatch.chdir(tmp_path)
    text = PROJECT.replace('"diff", "props", "judge", "ppl"', '"props"').replace(
        "examples = 3", "examples = 1"
    )
    project(tmp_path, text)
    done = verify("run", "--dry-run")
    assert done.returncode == 0 and done.stdout.count("$ verify ") == 2
    done = verify("run", "--out", "reports")
    assert done.returncode == 1, done.stderr
    assert "1-props: exit 0" in done.stdout and "2-diff: exit 1" in done.stdout
    made = {file.name for file in (tmp_path / "reports").iterdir()}
    assert {"1-props.xml", "2-diff", "2-diff.xml"} <= made
    monkeypatch.chdir(tmp_path.parent)
    assert_refused(verify("run"), "[tool.verify]")
