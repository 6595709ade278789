"""The process that a foreign kernel runs in, as we see it.

It imports none of our packages, so a user's `from kernels import ...` finds theirs, and a crash, a hang or a
leak in it becomes a `KernelFailure` here. Tensors travel through a memory-mapped file, questions and answers
as lines of JSON over pipes; `worker` is the other side.
"""

from __future__ import annotations

import json
import mmap
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from verify.kernels.errors import KernelFailure, SpecError

START_LIMIT_S = 120
# For a process to end after it has closed its pipes.
END_LIMIT_S = 5.0
CALL_LIMIT_S = 60
_ALIGNMENT = 64


class WorkerProcess:
    """A running worker; `greeting` is what its servant said when it had loaded.

    One that died is started again when it is next asked: what it is asked then is another question. One that
    hung is not, until `forgive`. spec: the specification that asked for it; name: what messages call the
    kernel; servant: the file of `worker.Servant`; arguments: what the servant is started with.
    Raises SpecError, one line, if the servant cannot use what it was given, or dies or hangs while it loads.
    """

    def __init__(self, spec: str, name: str, servant: str, arguments: Mapping[str, Any]) -> None:
        self.spec, self.name, self.servant, self.arguments = spec, name, servant, arguments
        self._hung = self._closed = False
        # What it said beside the results of the last question.
        self.said: dict[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        self._shared = tempfile.TemporaryFile(prefix="verify-")  # noqa: SIM115  (closed in `close`)
        child_reads, parent_writes = os.pipe()
        parent_reads, child_writes = os.pipe()
        here = Path(__file__).parent
        # -P keeps the worker's own folder off sys.path: the user's modules come first, ours are not found.
        command = [
            sys.executable, "-P", str(here / "worker.py"),
            str(child_reads), str(child_writes), str(self._shared.fileno()),
            str(here / self.servant), json.dumps(self.arguments),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
            pass_fds=(child_reads, child_writes, self._shared.fileno()),
        )
        os.close(child_reads)
        os.close(child_writes)
        self._to: IO[bytes] = os.fdopen(parent_writes, "wb", buffering=0)
        self._from: IO[bytes] = os.fdopen(parent_reads, "rb", buffering=0)
        try:
            self.greeting = self._read(START_LIMIT_S)
        except KernelFailure as failure:
            self.close()
            raise SpecError(f"kernel {self.spec!r}: {failure} while it was loaded") from None
        if "failure" in self.greeting:
            self.close()
            # What a library says while it fails to load may be many lines.
            said = " ".join(self.greeting["message"].split())
            raise SpecError(f"kernel {self.spec!r}: {said}")

    def ask(
        self,
        question: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        results: Mapping[str, tuple[int, ...]],
        limit_s: float,
    ) -> dict[str, torch.Tensor]:
        """The float32 tensors that the worker answers, of the shapes in `results`.

        tensors: contiguous, on the host. Raises KernelFailure on every way to fail, writing into an input
        among them.
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
        try:
            # Memory that is not there is refused here, not where it is written to.
            os.ftruncate(self._shared.fileno(), max(end, 1))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._shared.fileno(), 0, max(end, 1))
        except OSError as error:
            raise KernelFailure(
                "died", f"{self.name}: {end} bytes for its inputs cannot be had: {error.strerror or error}"
            ) from None
        with mmap.mmap(self._shared.fileno(), max(end, 1)) as memory:
            for name, x in tensors.items():
                start = layout[name][2]
                memory[start : start + x.nbytes] = _bytes_of(x)
            outputs = {name: [list(results[name]), place] for name, place in places.items()}
            answer = self._exchange(
                {**question, "tensors": layout, "results": outputs, "bytes": max(end, 1)}, limit_s
            )
            if "failure" in answer:
                raise KernelFailure(answer["failure"], f"{self.name}: {answer['message']}")
            for name, x in tensors.items():
                start = layout[name][2]
                if memory[start : start + x.nbytes] != _bytes_of(x):
                    raise KernelFailure("wrote-inputs", f"{self.name}: wrote into its input {name}")
            self.said = answer
            found = {}
            for name, place in places.items():
                raw = bytearray(memory[place : place + 4 * counts[name]])
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
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for stream in (self._to, self._from, self._shared):
            stream.close()

    def _exchange(self, question: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        try:
            self._to.write(json.dumps(question).encode() + b"\n")
        except BrokenPipeError:
            raise self._death() from None
        return self._read(limit_s)

    def _read(self, limit_s: float) -> dict[str, Any]:
        """One line of answer; a process that hangs is killed."""
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._from, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(limit_s):
                    self._hung = True
                    self._end()
                    raise KernelFailure("hung", f"{self.name}: no answer within {limit_s:g} s")
                piece = self._from.read(65536)
                if not piece:
                    raise self._death()
                line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> KernelFailure:
        assert self._process is not None
        try:
            code = self._process.wait(END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._hung = True
            self._end()
            return KernelFailure("hung", f"{self.name}: closed its pipes, and did not end")
        how = f"killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        self._end()
        return KernelFailure("died", f"{self.name}: its process was {how}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time one
        return f"signal {number}"


def _layout(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, list[Any]], int]:
    """Where each tensor lies in the shared file, as name -> [dtype, shape, offset], and their end."""
    layout: dict[str, list[Any]] = {}
    end = 0
    for name, x in tensors.items():
        layout[name] = [str(x.dtype).removeprefix("torch."), list(x.shape), end]
        end += -(-x.nbytes // _ALIGNMENT) * _ALIGNMENT
    return layout, end


def _bytes_of(x: torch.Tensor) -> bytes:
    return x.reshape(-1).view(torch.uint8).numpy().tobytes()


def _has_fileno(stream: Any) -> bool:
    try:
        stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    return True
