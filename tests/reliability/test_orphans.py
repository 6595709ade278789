"""Nothing that verify started outlives it, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from support.cli import verify
from support.engine import write_engine
from support.ppl_runs import Tiny, command, write_tiny
from support.problems import problem
from verify.kernels.errors import KernelFailure
from verify.kernels.registry import build_kernel

# A kernel, or an import, that writes down its process and a child's, and never ends by itself.
HANGS = """
import os, time
def hang(names):
    for name in names:
        child = os.fork()
        if child:
            continue
        open(os.path.join(os.environ["PIDS"], name), "w").write(str(os.getpid()))
        while True:
            time.sleep(0.2)
    open(os.path.join(os.environ["PIDS"], "leader"), "w").write(str(os.getpid()))
    while True:
        pass
"""
CALL = HANGS + "def attend(q, k, v, *, kv_len, scale):\n    hang(['child'])\n"
# In a row of a window: what is asked before the run has 1 or 64 keys.
LATER = HANGS + (
    "def attend(q, k, v, *, kv_len, scale):\n"
    "    if k.shape[1] not in (1, 64):\n        hang(['child'])\n    return q\n"
)
IMPORT = HANGS + "hang(['child'])\ndef attend(q, k, v, *, kv_len, scale):\n    pass\n"
# Seconds, on a busy machine.
PATIENCE = 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def runs(pid: int) -> bool:
    """Whether the process is there, and more than a name that nobody has asked for yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


class Watched:
    """A command with a hanging part that writes its pids into `folder`; all of it is ended at the end."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        folder.mkdir()
        self.process = subprocess.Popen(
            words,
            env={**os.environ, "PIDS": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> Watched:
        self.wait_for(lambda: {p.name for p in self.folder.iterdir()} == {"leader", "child"})
        self.wait_for(lambda: all(self.pids()))
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*self.pids(), self.process.pid]:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()

    def pids(self) -> list[int]:
        return [int(path.read_text() or 0) for path in self.folder.iterdir()]

    def wait_for(self, true: object) -> None:
        end = time.monotonic() + PATIENCE
        while not true():  # type: ignore[operator]
            assert time.monotonic() < end, "it did not come to that"
            time.sleep(0.05)

    def ends(self, number: int) -> tuple[int, str]:
        """Send the signal; exit code and output, once nothing runs and nobody holds the output any more."""
        self.process.send_signal(number)
        said, _ = self.process.communicate(timeout=PATIENCE)
        self.wait_for(lambda: not any(map(runs, self.pids())))
        return self.process.returncode, said


def slow_but(first: int, *others: int) -> list[object]:
    return [first, *(pytest.param(n, marks=pytest.mark.slow) for n in others)]


@pytest.mark.parametrize("number", slow_but(signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGINT))
def test_a_hanging_candidate_ends_with_the_run(tiny: Tiny, tmp_path: Path, number: int) -> None:
    (tmp_path / "hangs.py").write_text(LATER)
    out = tmp_path / "run"
    words = command(tiny, out, "--baseline", "eager", "--candidate", f"py:{tmp_path}/hangs.py::attend")
    with Watched(tmp_path / "pids", sys.executable, "-m", "verify", *words) as watched:
        code, said = watched.ends(number)
    if number == signal.SIGKILL:
        assert code == -number
        return
    assert code == 128 + number
    assert f"go on with: verify ppl --resume {out}" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_hanging_import_ends_with_the_run(tiny: Tiny, tmp_path: Path, number: int) -> None:
    (tmp_path / "hangs.py").write_text(IMPORT)
    words = command(
        tiny, tmp_path / "run", "--baseline", "eager", "--candidate", f"py:{tmp_path}/hangs.py::attend"
    )
    with Watched(tmp_path / "pids", sys.executable, "-m", "verify", *words) as watched:
        code, said = watched.ends(number)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_process_that_is_killed_takes_its_workers_with_it(tmp_path: Path) -> None:
    """As a library."""
    (tmp_path / "hangs.py").write_text(IMPORT)
    script = (
        f"from verify.kernels.registry import build_kernel\nbuild_kernel('py:{tmp_path}/hangs.py::attend')\n"
    )
    with Watched(tmp_path / "pids", sys.executable, "-c", script) as watched:
        assert watched.ends(signal.SIGKILL)[0] == -signal.SIGKILL


def test_a_call_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(CALL)
    pids = tmp_path / "pids"
    pids.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIDS", str(pids))
        kernel = build_kernel(f"py:{tmp_path}/hangs.py::attend,timeout=1")
    with pytest.raises(KernelFailure, match="no answer within 1 s"):
        kernel.run(problem(rows=5))
    kernel.close()
    end = time.monotonic() + PATIENCE
    while any(runs(int(path.read_text())) for path in pids.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_keeps_a_limit_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where we do not end it: stopped in a debugger, say."""
    monkeypatch.setattr("verify.kernels.foreign.process._OWN_LIMIT_AFTER_S", -3)
    (tmp_path / "hangs.py").write_text("def attend(q, k, v, *, kv_len, scale):\n    while True: pass\n")
    kernel = build_kernel(f"py:{tmp_path}/hangs.py::attend,timeout=4")
    with pytest.raises(KernelFailure, match="ended itself") as failed:
        kernel.run(problem(rows=5))
    assert failed.value.kind == "hung"
    kernel.close()


def replace_run(build: Path, body: str) -> None:
    """The program of a build answers --version and --help as before, and else runs `body`."""
    program = build / "bin/llama-perplexity"
    stub = program.rename(program.with_name("stub"))
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\nif {{'--version', '--help'}} & set(sys.argv):\n"
        f"    os.execv({str(stub)!r}, sys.argv)\n{body}"
    )
    program.chmod(0o755)


@pytest.mark.parametrize(
    "number", slow_but(signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
)
def test_a_hanging_engine_ends_with_the_command(tmp_path: Path, number: int) -> None:
    for name in ("a", "b"):
        write_engine(tmp_path / name)
        replace_run(tmp_path / name, f"{HANGS}\nhang(['child'])\n")
    (tmp_path / "text").write_text("a text")
    words = ["engines", "--a", str(tmp_path / "a"), "--b", str(tmp_path / "b"), "-m", str(tmp_path / "text")]
    words += ["-f", str(tmp_path / "text"), "-c", "16", "--work", str(tmp_path / "work")]
    with Watched(tmp_path / "pids", sys.executable, "-m", "verify", *words) as watched:
        code, said = watched.ends(number)
    assert code == (-number if number in (signal.SIGKILL, signal.SIGQUIT) else 128 + number), said


def test_an_engine_that_is_killed_from_outside_is_no_verdict(tmp_path: Path) -> None:
    write_engine(tmp_path / "a")
    write_engine(tmp_path / "b")
    replace_run(tmp_path / "b", "os.kill(os.getpid(), 9)\n")
    (tmp_path / "text").write_text(
        "a text of some length, long enough for a window or two of sixteen bytes\n"
    )
    done = verify(
        *("engines", "--a", str(tmp_path / "a"), "--b", str(tmp_path / "b"), "-m", str(tmp_path / "text")),
        *("-f", str(tmp_path / "text"), "-c", "16", "--chunks", "2", "--work", str(tmp_path / "work")),
    )
    assert done.returncode == 4, done.stdout
    assert "killed by SIGKILL" in done.stderr


def test_an_engine_that_dies_of_a_real_time_signal_is_broken(tmp_path: Path) -> None:
    write_engine(tmp_path / "a")
    write_engine(tmp_path / "b")
    # After its first window.
    replace_run(tmp_path / "b", "print('[1]1.0,', flush=True)\nos.kill(os.getpid(), 40)\n")
    (tmp_path / "text").write_text(
        "a text of some length, long enough for a window or two of sixteen bytes\n"
    )
    done = verify(
        *("engines", "--a", str(tmp_path / "a"), "--b", str(tmp_path / "b"), "-m", str(tmp_path / "text")),
        *("-f", str(tmp_path / "text"), "-c", "16", "--chunks", "2", "--work", str(tmp_path / "work")),
    )
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "died of signal signal 40" in done.stdout


def test_a_terminated_diff_keeps_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verify.diff import run as diff_run

    plain, calls = diff_run.examine, [0]

    def examine(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(diff_run, "examine", examine)
    out = tmp_path / "run"
    done = verify(
        *("diff", "--shape", "4/2x32", "--n-kv", "64", "--inputs", "gaussian,peaked,flat", "--device", "cpu"),
        *("--candidate", "eager:block=16", "--baseline", "eager", "--out", str(out)),
    )
    assert done.returncode == 128 + signal.SIGTERM, (done.stdout, done.stderr)
    assert '"interrupted after 1 inputs"' in (out / "run.json").read_text()


def test_an_interrupt_that_is_swallowed_ends_the_process_all_the_same() -> None:
    script = (
        "import time\nfrom verify.machine import standing\nstanding.GRACE_S = 1\n"
        "with standing.Ended():\n"
        "    while True:\n"
        "        try:\n            print('ready', flush=True)\n            time.sleep(60)\n"
        "        except KeyboardInterrupt:\n            pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == -signal.SIGALRM
