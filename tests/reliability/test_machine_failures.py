"""What the machine does to a kernel is never the kernel's verdict."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from support.cli import verify
from support.ppl_runs import Tiny, command, write_tiny
from support.problems import problem
from verify.kernels.errors import KernelFailure, MachineFailure
from verify.kernels.registry import build_kernel

USER = Path(__file__).parents[1] / "support/user_kernels.py"
VERDICTS = (0, 3)
CLOSED = ("<&-", ">&-", "2>&-", "<&- >&-", "<&- 2>&-", ">&- 2>&-", "3<&-", "<&- 3<&- 4<&-", ">&- 3>/dev/null")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 16 kB, which holds no call's inputs."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def kernel_file(folder: Path, body: str) -> str:
    (folder / "kernel.py").write_text(
        f"import os, signal, torch\ndef attend(q, k, v, *, kv_len, scale):\n    {body}\n"
    )
    return f"py:{folder / 'kernel.py'}::attend"


def run_shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", line],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, **environment},
    )


def shell_of(tiny: Tiny, out: Path, spec: str = f"py:{USER}::good") -> str:
    words = command(tiny, out, "--chunks", "1", "--baseline", "eager", "--candidate", spec)
    return " ".join([sys.executable, "-m", "verify", *words])


@pytest.mark.slow
def test_a_temporary_folder_without_room_blames_no_kernel(
    tiny: Tiny, tmp_path: Path, small_disk: Path
) -> None:
    done = run_shell(shell_of(tiny, tmp_path / "run"), TMPDIR=str(small_disk))
    assert done.returncode in VERDICTS, done.stderr
    assert "broken" not in done.stdout


def test_where_inputs_lie_in_the_temporary_folder_its_lack_of_room_is_the_machines(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on systems that have no files in memory."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    kernel = build_kernel(f"py:{USER}::good")
    with closing(kernel), pytest.raises(MachineFailure, match=r"for its inputs cannot be had.*TMPDIR"):
        kernel.run(problem(rows=400))


@pytest.mark.parametrize(
    "closed", [*(pytest.param(c, marks=pytest.mark.slow) for c in CLOSED), "<&- >&- 2>&-"]
)
def test_closed_standard_streams_blame_no_kernel(tiny: Tiny, tmp_path: Path, closed: str) -> None:
    done = run_shell(f"{shell_of(tiny, tmp_path / 'run')} {closed}")
    assert done.returncode in VERDICTS, done.stderr
    assert (tmp_path / "run/report.html").is_file()


def test_a_process_without_stdin_can_ask_a_kernel() -> None:
    """As a library, where nobody has put the streams in order."""
    script = (
        "import os, sys; os.close(0); os.close(1)\n"
        f"sys.path[:0] = [{str(USER.parents[1])!r}]\n"
        "from support.problems import problem\n"
        "from verify.kernels.registry import build_kernel\n"
        f"kernel = build_kernel('py:{USER}::good')\n"
        "kernel.run(problem(rows=5)); kernel.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("limit", [pytest.param("2147484", marks=pytest.mark.slow), "9" * 40])
def test_a_time_limit_beyond_the_clock_is_none(limit: str) -> None:
    kernel = build_kernel(f"py:{USER}::good,timeout={limit}")
    kernel.run(problem(rows=5))
    kernel.close()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        pytest.param("os.kill(os.getpid(), signal.SIGTERM)", "killed by SIGTERM", marks=pytest.mark.slow),
        ("return torch.empty(1 << 60)", "RuntimeError"),
        pytest.param("return bytearray(1 << 60)", "MemoryError", marks=pytest.mark.slow),
        pytest.param("raise OSError(28, 'No space left on device')", "No space left", marks=pytest.mark.slow),
        ("raise torch.OutOfMemoryError('CUDA out of memory.')", "CUDA out of memory"),
    ],
)
def test_what_ends_or_starves_a_worker_is_the_machines(tmp_path: Path, body: str, said: str) -> None:
    kernel = build_kernel(kernel_file(tmp_path, body))
    with pytest.raises(MachineFailure, match=said):
        kernel.run(problem(rows=5))
    kernel.close()


@pytest.mark.parametrize(
    "body", [pytest.param("os.abort()", marks=pytest.mark.slow), "os._exit(3)", "raise SystemExit(3)"]
)
def test_what_a_kernel_does_itself_is_its_own(tmp_path: Path, body: str) -> None:
    kernel = build_kernel(kernel_file(tmp_path, body))
    with pytest.raises(KernelFailure):
        kernel.run(problem(rows=5))
    kernel.close()


def test_no_process_for_a_worker_is_the_machines() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]
    highest = max(held)
    for fd in held:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest - 4, hard))
    try:
        with pytest.raises(MachineFailure, match="no process can be had"):
            build_kernel(f"py:{USER}::good")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_killed_worker_ends_the_run_with_exit_4_and_keeps_it(tiny: Tiny, tmp_path: Path) -> None:
    # Not at the calls of 1 and 64 keys before there is a folder, which ask what it answers in and computes.
    dies = "if k.shape[1] not in (1, 64): os.kill(os.getpid(), signal.SIGKILL)\n"
    dies += "    return torch.zeros(*q.shape[:3], v.shape[3])"
    spec = kernel_file(tmp_path, dies)
    done = verify(*command(tiny, tmp_path / "run", "--baseline", "eager", "--candidate", spec))
    assert done.returncode == 4
    assert "the machine failed" in done.stderr and "killed by SIGKILL" in done.stderr
    assert f"--resume {tmp_path / 'run'}" in done.stderr


def test_a_law_is_not_broken_by_the_machine(tmp_path: Path) -> None:
    spec = kernel_file(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    done = verify("props", spec, "--law", "within-budget", "--law", "two-runs", "--examples", "2")
    assert done.returncode == 4, done.stdout
    assert "broken" not in done.stdout


def test_a_worker_that_is_killed_from_outside_is_the_machines(tmp_path: Path) -> None:
    kernel = build_kernel(kernel_file(tmp_path, "os.kill(os.getppid(), 0); signal.pause()"))
    process = kernel._worker._process  # type: ignore[attr-defined]
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -{int(signal.SIGTERM)} {process.pid}"])
    with pytest.raises(MachineFailure, match="SIGTERM"):
        kernel.run(problem(rows=5))
    kernel.close()
