"""What is installed: one package of one name, which others' files of common names do not disturb."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.tiny_model import write_text, write_tiny_model

ROOT = Path(__file__).parents[1]
# Where each top-level folder lies in the installed package.
FOLDERS = {"verify": "verify", "kernels": "verify/kernels", "model": "verify/model", "data": "verify/data"}
BUILD = "import setuptools.build_meta as b; print(b.build_wheel('out'))"


def run(command: Sequence[str], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command, with these environment variables changed."""
    env = {**os.environ, **variables}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of this tree: building leaves folders behind."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    done = run([sys.executable, "-c", BUILD], tree)
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = (tree / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that holds the wheel, without what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    done = run([*pip, "--target", str(folder), str(wheel)], folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_owns_one_name_and_holds_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
    assert {name.split("/")[0] for name in names} == {"verify", wheel.name.split("-py3")[0] + ".dist-info"}
    tree = {
        f"{place}/{path.relative_to(ROOT / folder)}"
        for folder, place in FOLDERS.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if name.startswith("verify/")} == tree


def test_the_wheel_works_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import verify.kernels.merge as m, verify.model.locate, verify.data, verify.reports.templating as t\n"
        "print(m.__file__, t.__file__)\n"
        "for name in ('verify.verify', 'verify.tests', 'verify.benchmarks', 'support'):\n"
        "    try: __import__(name)\n"
        "    except ModuleNotFoundError: continue\n"
        "    print(name)\n"
    )
    done = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed))
    assert done.stdout.split() == [
        str(installed / "verify/kernels/merge.py"),
        str(installed / "verify/reports/templating.py"),
    ], done.stderr
    done = run([sys.executable, "-m", "verify", "plan"], tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0 and "ik-1183" in done.stdout, done.stderr


def test_a_checkout_has_no_other_names() -> None:
    """In this process too: the top level is not the package's own folder."""
    for name in ("verify.verify", "verify.tests", "verify.benchmarks"):
        with pytest.raises(ModuleNotFoundError):
            __import__(name)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A user's folder with files of the names that ours once had."""
    (tmp_path / "kernels").mkdir()
    for file in ("kernels/__init__.py", "data.py", "model.py"):
        (tmp_path / file).write_text("MINE = True\n")
    write_tiny_model(tmp_path / "tiny.gguf")
    write_text(tmp_path / "text.txt")
    return tmp_path


SCRIPT = [str(Path(sys.executable).with_name("verify"))]
MODULE = [sys.executable, "-m", "verify"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "verify"]
PPL = ("ppl", "-m", "tiny.gguf", "-f", "text.txt", "-c", "64", "--chunks", "2", "--device", "cpu",
       "--baseline", "eager", "--candidate", "eager:block=16", "--out", "run")  # fmt: skip


def test_the_script_in_a_folder_with_names_that_ours_once_had(theirs: Path) -> None:
    done = run([*SCRIPT, "list"], theirs)
    assert done.returncode == 0 and "flash" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "start", [MODULE, pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["module", "torchrun"]
)
def test_a_run_in_a_folder_with_names_that_ours_once_had(start: list[str], theirs: Path) -> None:
    done = run([*start, *PPL], theirs)
    # Two windows are too few for more: what matters is that it was measured, and said.
    report = json.loads((theirs / "run/run.json").read_text())
    assert (report["verdict"], report["exit_code"]) == ("inconclusive", 3), done.stderr[-2000:]
    # torchrun ends with 1 whatever its processes end with.
    assert done.returncode == (3 if start is MODULE else 1)


def test_a_users_own_tests_import_both(theirs: Path) -> None:
    (theirs / "test_mine.py").write_text(
        "import data, kernels, model\n"
        "import verify.data, verify.kernels.merge, verify.model.locate\n\n"
        "def test_each_is_its_own():\n"
        "    assert data.MINE and kernels.MINE and model.MINE\n"
        "    assert verify.data.load_corpus and verify.kernels.merge.merge_tree\n"
    )
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], theirs)
    assert done.returncode == 0, done.stdout[-2000:]
