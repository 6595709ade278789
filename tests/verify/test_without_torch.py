"""Commands that need no torch do not wait for it: each in a process of its own, asked what it loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.cli import assert_refused, verify
from support.logits_files import write_file
from support.tiny_model import write_text, write_tiny_model
from verify.commands import COMMANDS, load

ROOT = Path(__file__).parents[2]

HEAVY = ("torch", "datasets", "transformers", "triton", "hypothesis", "scipy.stats")
# What an answer in words needs no more than torch.
FOR_FIGURES = ("scipy", "matplotlib", "pyarrow", "jinja2")
# Modules of all packages, Python's own among them: what start-up takes, whatever else the machine does.
MOST_FOR_HELP, MOST_FOR_SMALL = 620, 760
# Runs each line of arguments as the console script does; says how it ended, and which of these are loaded;
# then how many modules are.
ASK = f"""
import json, sys
from verify.__main__ import main
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as stop:
        print("exit", stop.code, *(name for name in {HEAVY + FOR_FIGURES} if name in sys.modules))
print(len(sys.modules))
"""
TIMES = [f"| 512 | 128 | {n} | 1.0 | 512 | 2.0 | 64.0 |\n" for n in range(0, 9000, 1024)]
SWEEP = "| PP | TG | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s |\n|---|---|---|---|---|---|---|\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two logits files, a log of sweep-bench, and the folder of a run."""
    folder = tmp_path_factory.mktemp("inputs")
    write_file(folder / "a.kld")
    write_file(folder / "b.kld", noise=0.01)
    (folder / "log.md").write_text(SWEEP + "".join(TIMES))
    model, text = write_tiny_model(folder / "tiny.gguf"), write_text(folder / "text.txt")
    small = ("-m", str(model), "-f", str(text), "-c", "64", "--chunks", "2", "--device", "cpu")
    plans = ("--baseline", "eager", "--candidate", "eager:block=16", "--out", str(folder / "run"))
    done = verify("ppl", *small, *plans)
    assert (folder / "run" / "report.html").is_file(), done.stderr
    return folder


def loaded_by(folder: Path, *lines: tuple[str, ...], before: str = "") -> subprocess.CompletedProcess[str]:
    """One process of its own that runs all of these."""
    command = [sys.executable, "-c", before + ASK, json.dumps(lines)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)


@pytest.mark.parametrize(
    "lines",
    [
        [("list",)],
        [("plan", "--arch", "glm4moe", "--n-kv", "32768")],
        [("kld", "a.kld", "b.kld")],
        # With pictures or pages: one process, which has loaded nothing heavy when the last has ended.
        [
            ("sweep", "log.md", "log.md", "--out", "sweep.png"),
            ("report", "run"),
            ("report", "run", "run", "--out", "both"),
        ],
    ],
    ids=lambda lines: ", ".join(words[0] for words in lines),
)
def test_no_torch_where_none_is_needed(folder: Path, lines: list[tuple[str, ...]]) -> None:
    done = loaded_by(folder, *lines)
    said = [line for line in done.stdout.splitlines() if line.startswith("exit ")]
    modules = int(done.stdout.splitlines()[-1])
    assert [line.split()[1] for line in said] == ["0"] * len(lines), done.stdout[-500:] + done.stderr[-500:]
    assert set(said[-1].split()[2:]).isdisjoint(HEAVY), said
    assert len(lines) > 1 or modules <= MOST_FOR_SMALL, modules


def test_no_torch_for_help(tmp_path: Path) -> None:
    lines = [("--help",), *((name, "--help") for name in COMMANDS)]
    done = loaded_by(tmp_path, *lines)
    said = [line for line in done.stdout.splitlines() if line.startswith("exit")]
    assert said == ["exit 0"] * len(lines), done.stdout[-500:] + done.stderr[-500:]
    modules = int(done.stdout.splitlines()[-1])
    assert modules <= MOST_FOR_HELP, modules


def test_every_command_is_a_module_of_its_own() -> None:
    listed = {command.module for command in COMMANDS.values()}
    files = {path.stem for path in (ROOT / "verify/commands").glob("*.py")}
    there = files - {"__init__", "help_pages", "options"}
    assert listed == there
    for name, command in COMMANDS.items():
        module = import_module(f"verify.commands.{command.module}")
        assert module.command.__doc__ and load(name).name == name


def test_an_option_that_is_refused_names_the_command_that_has_it_not() -> None:
    assert_refused(verify("plan", "--chunks", "3"), "--chunks")
    assert_refused(verify("plann"), "plann", "'plan'")


@pytest.mark.parametrize("gone", ["scipy", "verify.commands", "verify.machine.errors", "torch"])
def test_a_broken_installation_is_no_verdict(gone: str, tmp_path: Path) -> None:
    """Exit 1 would say that a kernel is broken."""
    lines = ("diff", "--shape", "4/2x16", "--n-kv", "8", "--out", "run")
    done = loaded_by(tmp_path, lines, before=f"import sys; sys.modules[{gone!r}] = None\n")
    assert done.stdout.split()[:2] == ["exit", "4"], done.stdout
    (line,) = done.stderr.splitlines()
    assert "broken installation, nothing was measured" in line and gone in line


@pytest.mark.parametrize("also", ["", "triton"])
def test_python_ends_without_a_search_for_cycles(also: str) -> None:
    """With torch loaded that was half a second after the last word. Triton without one says what it leaks.
    Callbacks run from last to first."""
    if also and find_spec(also) is None:
        pytest.skip(f"{also} is not installed")
    said = "import atexit, gc, sys\natexit.register(lambda: print('frozen', gc.get_freeze_count() > 0))\n"
    said += f"import {also}\n" if also else ""
    run = "from verify.__main__ import main\nsys.argv[1:] = ['plan', '--help']\nmain()\n"
    done = subprocess.run(
        [sys.executable, "-c", said + run], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[-1] == f"frozen {not also}"
