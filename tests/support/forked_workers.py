"""Workers of foreign kernels, forked from a server that has torch loaded: loading it is most of a start.

They have their own session, descriptors, folder and variables, as those that are started have, and nothing of
ours in them. How a worker is started is asked of real ones: tests/kernels/test_foreign.py, tests/reliability.
"""

from __future__ import annotations

import ctypes
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The child of a child that has ended belongs to the nearest process above that asked for such: it is ours
# then, and can be waited for.
_PR_SET_CHILD_SUBREAPER = 36
_MOST_BYTES = 1 << 17
# Beginnings of the variables that torch, and what it is made of, may read when they are loaded.
_READ_AT_LOAD = (
    "ATEN_", "CUDA", "DNNL_", "GOMP_", "KMP_", "LD_", "MALLOC_", "MKL_", "NVIDIA", "OMP_", "ONEDNN_",
    "OPENBLAS_", "PYTHON", "PYTORCH_", "TORCH", "TRITON",
)  # fmt: skip
_SERVER = """
import fcntl, json, os, runpy, socket, sys
import numpy, torch
server = socket.socket(fileno=int(sys.argv[1]))
while True:
    message, fds, _, _ = socket.recv_fds(server, 1 << 17, 16)
    if not message:
        break
    asked = json.loads(message)
    reads, writes = os.pipe()
    between = os.fork()
    if between == 0:
        child = os.fork()
        if child:
            os.write(writes, str(child).encode())
            os._exit(0)
        os.setsid()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 500) for fd in fds]
        os.closerange(0, 500)
        os.open(os.devnull, os.O_RDONLY)
        for fd, number in zip(high, asked["fds"]):
            os.dup2(fd, number)
        os.closerange(500, 600)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        sys.argv = asked["words"]
        numpy.random.seed()
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit(0)
    os.close(writes)
    os.waitpid(between, 0)
    server.send(os.read(reads, 100))
    for fd in (reads, *fds):
        os.close(fd)
"""


class _Forked(subprocess.Popen[bytes]):
    """A process that another one has made for us."""

    def __init__(self, pid: int, args: Sequence[str]) -> None:
        self.pid, self.args, self.returncode = pid, args, None
        self.stdin = self.stdout = self.stderr = None
        self._waitpid_lock = threading.Lock()
        self._child_created = True


class ForkedWorkers:
    """Stands for the module `subprocess` where workers are started. Each is given its own variables; where
    those differ from the first's that libraries read when they are loaded, or the server is not to be had, it
    is started as ever."""

    DEVNULL = subprocess.DEVNULL
    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._known: dict[str, str] = {}  # variables that the server's libraries have read

    def Popen(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int,
        stdout: int,
        stderr: int,
        pass_fds: Sequence[int],
        start_new_session: bool,
    ) -> subprocess.Popen[bytes]:
        known = {name: value for name, value in env.items() if name.startswith(_READ_AT_LOAD)}
        if self._server is None:
            self._begin(dict(env))
            self._known = known
        if known != self._known or self._server is None or self._server.poll() is not None:
            return subprocess.Popen(
                command, env=env, stdin=stdin, stdout=stdout, stderr=stderr, pass_fds=pass_fds,
                start_new_session=start_new_session,
            )  # fmt: skip
        assert self._socket is not None and list(command[:2]) == [sys.executable, "-P"]
        asked = {
            "words": list(command[2:]),
            "env": dict(env),
            "cwd": str(Path.cwd()),
            "fds": [1, 2, *pass_fds],
        }
        message = json.dumps(asked).encode()
        assert len(message) < _MOST_BYTES
        _adopt(True)
        try:
            socket.send_fds(self._socket, [message], [stdout, stderr, *pass_fds])
            pid = int(self._socket.recv(100))
        finally:
            _adopt(False)
        return _Forked(pid, command)

    def _begin(self, env: dict[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVER, str(theirs.fileno())],
                env=env,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
            )

    def close(self) -> None:
        if self._socket is not None and self._server is not None:
            self._socket.close()
            self._server.wait(60)


def _adopt(on: bool) -> None:
    done: Any = ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)
    assert done == 0
