"""The process that a foreign kernel runs in, as we see it.

It imports none of our packages, so a user's `from kernels import ...` finds theirs, and a crash, a hang or a
leak in it becomes a `KernelFailure` here. Where the machine fails it instead (no memory, no room, killed from
outside) that is a `MachineFailure`. Tensors travel through a shared file, which we read and write and never
map: a worker that cuts it short shall not kill us. Questions and answers are lines of JSON over pipes;
`worker` is the other side. It leads a process group of its own, which ends with us (`lifeline`).
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verify.kernels.errors import KernelFailure, MachineFailure, SpecError
from verify.kernels.foreign.lifeline import (
    FROM_OUTSIDE,
    LifeLine,
    above_standard,
    end_group,
    pipe,
    signal_name,
)
from verify.kernels.foreign.overheard import Overheard
from verify.kernels.waiting import waiting_variables

START_LIMIT_S = 120
# For a process to end after it has closed its pipes.
END_LIMIT_S = 5.0
# An answer is a line about shapes; its tensors lie in the shared file.
MOST_ANSWER_BYTES = 1 << 20
# Beyond this a time limit is none: no clock need be asked for it.
_LONGEST_S = 1e9
# The worker ends itself this long after we should have ended it.
_OWN_LIMIT_AFTER_S = 30
_ALIGNMENT = 64
_PIECE = 1 << 16
# Bytes of an input that are held against what was sent, at a time.
_COMPARED = 1 << 22
_KINDS = {"raised", "shape", "dtype", "device", "unsupported", "import"}
# What a servant says, and of what type: when it has loaded; and beside results, where it says it at all. A
# kernel is in the same process and may have written into the pipe itself.
_GREETINGS: dict[str, dict[str, type]] = {
    "python_servant.py": {
        "takes": list,
        "left_out": dict,
        "way": str,
        "layout": str,
        "dtypes": list,
        "one_head_each": bool,
        "never_right": bool,
        "said": list,
    },
    "merge_servant.py": {"writes": bool},
    "cheat_servant.py": {"way": str, "layout": str},
    "ggml_servant.py": {"version": str, "binary": str, "sinks": bool, "backend": str},
}
_BESIDE_RESULTS = {"lse": bool, "dtype": str, "caught": str, "not_run": str, "seconds": list}


class WorkerProcess:
    """A running worker; `greeting` is what its servant said when it had loaded.

    One that died is started again when it is next asked: what it is asked then is another question. One that
    hung is not, until `forgive`. A time limit is one over a whole answer. spec: the specification that asked
    for it; name: what messages call the kernel; servant: the file of `worker.Servant`; arguments: what the
    servant is started with.
    Raises SpecError, one line, if the servant cannot use what it was given, or dies or hangs while it loads;
    MachineFailure where no process can be had, or the system ends it.
    """

    def __init__(self, spec: str, name: str, servant: str, arguments: Mapping[str, Any]) -> None:
        self.spec, self.name, self.servant, self.arguments = spec, name, servant, arguments
        self._hung = self._closed = False
        # What it said beside the results of the last question.
        self.said: dict[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        try:
            self._start()
        except OSError as error:
            raise MachineFailure(
                f"kernel {self.spec!r}: no process can be had for it: {error.strerror or error}",
                memory=error.errno == errno.ENOMEM,
            ) from None
        try:
            self.greeting = self._read(START_LIMIT_S)
        except KernelFailure as failure:
            self.close()
            raise SpecError(f"kernel {self.spec!r}: {failure} while it was loaded") from None
        except BaseException:
            # An interrupt too: nothing is left running.
            self.close()
            raise
        if "failure" in self.greeting:
            self.close()
            # What a library says while it fails to load may be many lines.
            raise SpecError(f"kernel {self.spec!r}: {KernelFailure('import', self.greeting['message'])}")
        wanted = _GREETINGS[self.servant]
        if not all(isinstance(self.greeting.get(name), kind) for name, kind in wanted.items()):
            self.close()
            raise SpecError(
                f"kernel {self.spec!r}: {self.name}: what it answered while it was loaded is no answer:"
                f" {str(self.greeting)[:80]!r}"
            )

    def _start(self) -> None:
        """Raises OSError; nothing is left open or running then."""
        self._fds: list[int] = []
        given: list[int] = []
        self._life: LifeLine | None = None
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._shared = _shared_file()
            self._fds.append(self._shared)
            child_reads, self._to = pipe()
            given.append(child_reads)
            self._fds.append(self._to)
            self._from, child_writes = pipe()
            given.append(child_writes)
            self._fds.append(self._from)
            self._output, output_writes = pipe()
            given.append(output_writes)
            self._fds.append(self._output)
            self._life = LifeLine()
            here = Path(__file__).parent
            # -P keeps the worker's own folder off sys.path: the user's modules come first.
            command = [
                sys.executable, "-P", str(here / "worker.py"),
                str(child_reads), str(child_writes), str(self._shared), str(self._life.reads),
                str(here / self.servant), json.dumps(self.arguments),
            ]  # fmt: skip
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **waiting_variables(os.environ)},
                stdin=subprocess.DEVNULL,
                stdout=output_writes,
                stderr=output_writes,
                pass_fds=(child_reads, child_writes, self._shared, self._life.reads),
                start_new_session=True,
            )
            self._life.hold(self._process.pid)
        except BaseException:
            self._end()
            raise
        finally:
            for fd in given:
                os.close(fd)
        for fd in (self._from, self._output):
            os.set_blocking(fd, False)
        self._heard = Overheard(self._output)

    def ask(
        self,
        question: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        results: Mapping[str, tuple[int, ...]],
        limit_s: float,
    ) -> dict[str, torch.Tensor]:
        """The float32 tensors that the worker answers, of the shapes in `results`.

        tensors: contiguous, on the host. Raises KernelFailure on every way to fail, writing into an input
        among them; MachineFailure where the machine failed it.
        """
        if self._hung:
            raise KernelFailure("hung", f"{self.name}: hung before, and is not asked again")
        if self._closed:
            raise KernelFailure("died", f"{self.name}: its process was closed")
        if self._process is None:
            self._begin()
        layout, size = _layout(tensors)
        counts = {name: int(np.prod(shape)) for name, shape in results.items()}
        places: dict[str, int] = {}
        end = size
        for name, count in counts.items():
            places[name] = end
            end += 4 * count
        size = max(end, 1)
        try:
            # Memory that is not there is refused here, not where it is written to.
            os.ftruncate(self._shared, size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._shared, 0, size)
            for name, x in tensors.items():
                _write(self._shared, _bytes_of(x), layout[name][2])
        except OSError as error:
            self._end()
            raise MachineFailure(
                f"{self.name}: {end} bytes for its inputs cannot be had: {error.strerror or error}"
                f" ({_where_shared()})",
                memory=True,
            ) from None
        outputs = {name: [list(results[name]), place] for name, place in places.items()}
        answer = self._exchange({**question, "tensors": layout, "results": outputs, "bytes": size}, limit_s)
        if "failure" in answer:
            raise KernelFailure(answer["failure"], f"{self.name}: {answer['message']}")
        if not all(isinstance(answer.get(name, kind()), kind) for name, kind in _BESIDE_RESULTS.items()):
            self._end()
            raise KernelFailure("died", f"{self.name}: what it answered is no answer: {str(answer)[:80]!r}")
        if os.fstat(self._shared).st_size < size:
            self._end()
            raise KernelFailure("wrote-inputs", f"{self.name}: cut the file of its inputs and results short")
        for name, x in tensors.items():
            if not _holds(self._shared, _bytes_of(x), layout[name][2]):
                raise KernelFailure("wrote-inputs", f"{self.name}: wrote into its input {name}")
        self.said = answer
        found = {}
        for name, place in places.items():
            raw = _read_at(self._shared, 4 * counts[name], place)
            numbers = torch.frombuffer(raw, dtype=torch.float32) if raw else torch.empty(0)
            found[name] = numbers.view(results[name])
        return found

    def forgive(self) -> None:
        """Ask it again, though it hung."""
        self._hung = False

    def close(self) -> None:
        """End the process; it can be asked nothing more."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        """End the process and all that it started."""
        if self._process is not None:
            end_group(self._process)
            self._process = None
        if self._life is not None:
            self._life.close()
            self._life = None
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _exchange(self, question: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        self._heard.forget()
        # The worker's own clock, where ours is not there to end it.
        own_limit = int(min(limit_s, _LONGEST_S)) + _OWN_LIMIT_AFTER_S
        left = json.dumps({**question, "limit_s": own_limit}).encode() + b"\n"
        try:
            while left:
                left = left[os.write(self._to, left) :]
        except BrokenPipeError:
            raise self._death() from None
        return self._read(limit_s)

    def _read(self, limit_s: float) -> dict[str, Any]:
        """One line of answer, within the limit as a whole; a process that hangs is killed."""
        deadline = time.monotonic() + min(limit_s, _LONGEST_S)
        line = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._from, selectors.EVENT_READ)
            selector.register(self._output, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0:
                    self._hung = True
                    self._end()
                    raise KernelFailure("hung", f"{self.name}: no answer within {limit_s:g} s")
                ready = {key.fd for key, _ in selector.select(min(left, 3600.0))}
                if self._output in ready and not self._heard.take():
                    selector.unregister(self._output)
                if self._from not in ready:
                    continue
                piece = os.read(self._from, _PIECE)
                if not piece:
                    raise self._death()
                line += piece
                if len(line) > MOST_ANSWER_BYTES:
                    self._end()
                    raise KernelFailure("died", f"{self.name}: answered with more than {len(line) - 1} bytes")
        self._heard.take()
        return self._understood(bytes(line))

    def _understood(self, line: bytes) -> dict[str, Any]:
        """An answer, if it is one: a kernel may have written into the pipe itself."""
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict) and "failure" not in answer:
            return answer
        known = answer if isinstance(answer, dict) else {}
        failure, message = known.get("failure"), known.get("message")
        if failure == "machine" and isinstance(message, str):
            self._end()
            raise MachineFailure(f"{self.name}: {message}", memory=True)
        if not isinstance(failure, str) or failure not in _KINDS or not isinstance(message, str):
            self._end()
            raise KernelFailure("died", f"{self.name}: what it answered is no answer: {line[:80]!r}")
        return {"failure": failure, "message": message}

    def _death(self) -> KernelFailure | MachineFailure:
        assert self._process is not None
        try:
            code = self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._hung = True
            self._end()
            return KernelFailure("hung", f"{self.name}: closed its pipes, and did not end")
        self._heard.take()
        heard = self._heard.first_line
        self._end()
        if code >= 0:
            how = f"ended with exit code {code}"
        elif -code == signal.SIGALRM:
            self._hung = True
            return KernelFailure("hung", f"{self.name}: ended itself, past its time limit")
        else:
            how = f"killed by {signal_name(-code)}"
        said = f"{self.name}: its process was {how}" + (f": {heard}" if heard else "")
        if -code in FROM_OUTSIDE:
            why = "where memory ran out the system does that" if -code == signal.SIGKILL else "from outside"
            return MachineFailure(f"{said} ({why})")
        return KernelFailure("died", said)


def _layout(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, list[Any]], int]:
    """Where each tensor lies in the shared file, as name -> [dtype, shape, offset], and their end."""
    layout: dict[str, list[Any]] = {}
    end = 0
    for name, x in tensors.items():
        layout[name] = [str(x.dtype).removeprefix("torch."), list(x.shape), end]
        end += -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
    return layout, end


def _bytes_of(x: torch.Tensor) -> memoryview:
    """Its bytes as they lie, not copied: a long cache is half a gigabyte."""
    return x.detach().reshape(-1).view(torch.uint8).numpy().data


def _shared_file() -> int:
    """A file without a name: in memory where the system has such, else in the temporary folder."""
    if hasattr(os, "memfd_create"):
        try:
            return above_standard(os.memfd_create("verify", os.MFD_CLOEXEC))
        except OSError:
            pass  # forbidden here
    with tempfile.TemporaryFile(prefix="verify-") as file:
        return above_standard(os.dup(file.fileno()))


def _where_shared() -> str:
    if hasattr(os, "memfd_create"):
        return "they lie in memory"
    return f"they lie in {tempfile.gettempdir()}, TMPDIR names another folder"


def _write(fd: int, content: memoryview, at: int) -> None:
    left = content
    while left:
        done = os.pwrite(fd, left, at)
        left, at = left[done:], at + done


def _read_at(fd: int, count: int, at: int) -> bytearray:
    """Fewer bytes where the file ends before."""
    found = bytearray(count)
    done = 0
    while done < count:
        got = os.preadv(fd, [memoryview(found)[done:]], at + done)
        if not got:
            break
        done += got
    return found[:done]


def _holds(fd: int, content: memoryview, at: int) -> bool:
    """Whether a file has these bytes at this place; looked at a piece at a time."""
    return all(
        _read_at(fd, len(piece), at + start) == piece
        for start in range(0, len(content), _COMPARED)
        for piece in (content[start : start + _COMPARED],)
    )
