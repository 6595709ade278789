"""`verify ARGUMENTS` in processes that have the program loaded already: a server forks one for each.

So a signal at a random moment meets the run more often than its imports, and a case costs a second less.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

_SERVER = """
import json, os, sys
from verify.__main__ import main
from verify.machine.environment import prepare_variables
prepare_variables()
import verify.commands.ppl, verify.ppl.experiment, verify.reports.writing
for line in sys.stdin:
    asked = json.loads(line)
    pid = os.fork()
    if pid == 0:
        said = os.open(asked["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for fd, of in ((0, os.open(os.devnull, os.O_RDONLY)), (1, said), (2, said)):
            os.dup2(of, fd)
        os.closerange(3, 20)
        os.environ.update(asked["env"])
        sys.argv = ["verify", *asked["words"]]
        main()
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forked:
    """A command that was begun. said: the file with what it prints."""

    def __init__(self, server: Forks, said: Path) -> None:
        self._server, self.said = server, said
        self.pid = server._number(60)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> tuple[int, str]:
        """Its exit code, -number of a signal, and what it printed. Raises subprocess.TimeoutExpired."""
        code = self._server._number(timeout)
        return code, self.said.read_text(errors="replace")


class Forks:
    """The server. One command at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._read = b""

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()

    def begin(self, *words: str, said: Path, **env: str) -> Forked:
        """`verify *words` with those variables, its output in the file `said`."""
        assert self._process.stdin is not None
        asked = {"words": words, "said": str(said), "env": env}
        self._process.stdin.write(json.dumps(asked).encode() + b"\n")
        self._process.stdin.flush()
        return Forked(self, said)

    def _number(self, timeout: float) -> int:
        assert self._process.stdout is not None
        fd, end = self._process.stdout.fileno(), time.monotonic() + timeout
        while b"\n" not in self._read:
            if not select.select([fd], [], [], max(0, end - time.monotonic()))[0]:
                raise subprocess.TimeoutExpired("verify", timeout)
            self._read += os.read(fd, 100)
        line, _, self._read = self._read.partition(b"\n")
        return int(line)
