"""A user's own kernel, `py:FILE.py::FUNCTION`, run in a process of its own.

The process imports none of our packages, so the user's `from kernels import ...` finds theirs, and a crash, a
hang or a leak in it becomes a `KernelFailure` here. Tensors travel through a memory-mapped file; see
`foreign_worker` for the other side.

    FUNCTION(q, k, v, *, kv_len, scale[, path, sliding_window, softcap, sinks, alibi_slopes])
        -> out or (out, lse), shapes as in `contract`, any float dtype
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import IO, Any

import numpy as np
import torch

from kernels.arithmetic import Arithmetic, loosest
from kernels.capabilities import Capabilities
from kernels.contract import AttentionOutput, Call, Kernel, Path, Shape
from kernels.errors import KernelFailure, SpecError
from kernels.spec import Spec, choice, number
from kernels.trace import Signature

START_LIMIT_S = 120
CALL_LIMIT_S = 60
TYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f32"}
FOREIGN_OPTIONS: dict[str, str] = {
    "timeout": f"seconds that one call may take; default {CALL_LIMIT_S}",
    "acc": "f32: the kernel is known to accumulate in float32, so that a tighter error budget applies",
}
_ALIGNMENT = 64
# What a function is given only if it asks for it; without it, a call that needs it is refused.
_OPTIONAL = ("sliding_window", "softcap", "sinks", "alibi_slopes")


class ForeignKernel(Kernel):
    """A function of a Python file, in its own process."""

    def __init__(self, spec: str, file: FilePath, function: str, *, limit_s: int, acc: str | None) -> None:
        super().__init__(spec)
        self.file, self.function, self.limit_s, self.acc = file, function, limit_s, acc
        self.binary = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        self._process: subprocess.Popen[bytes] | None = None
        self._to: IO[bytes] | None = None
        self._from: IO[bytes] | None = None
        self._shared: IO[bytes] | None = None
        self._start()

    @classmethod
    def from_spec(cls, spec: Spec) -> ForeignKernel:
        """Raises SpecError, one line, if the file or the function cannot be used."""
        path, separator, function = spec.target.rpartition("::")
        if not separator or not function.isidentifier():
            raise SpecError(f"kernel {spec.text!r}: expected py:FILE.py::FUNCTION")
        file = FilePath(path)
        if not file.is_file():
            raise SpecError(f"kernel {spec.text!r}: {path}: no such file")
        acc = choice(spec, "acc", "f32", ("f32", "f16")) if "acc" in spec.options else None
        return cls(spec.text, file, function, limit_s=number(spec, "timeout", CALL_LIMIT_S), acc=acc)

    def arithmetic(self, shape: Shape, path: Path) -> Arithmetic:
        return loosest("f16", acc=self.acc)

    def capabilities(self) -> Capabilities:
        # Whether it returns the lse, it shows when it runs.
        return Capabilities(
            sliding_window="sliding_window" in self._takes,
            softcap="softcap" in self._takes,
            sinks="sinks" in self._takes,
            alibi="alibi_slopes" in self._takes,
            plans=False,
            head_groups=False,
            row_alone=False,
        )

    def run(self, call: Call) -> AttentionOutput:
        inputs = {"q": call.q, "k": call.k, "v": call.v, "kv_len": call.kv_len.to(torch.int32)}
        for name in ("sinks", "alibi_slopes"):
            if (given := getattr(call, name)) is not None:
                inputs[name] = given.float()
        host = {name: x.detach().cpu().contiguous() for name, x in inputs.items()}
        out_shape = (*call.q.shape[:3], call.shape.v_size)
        layout, size = _layout(host)
        size_out, size_lse = 4 * int(np.prod(out_shape)), 4 * int(np.prod(out_shape[:3]))
        assert self._shared is not None
        os.ftruncate(self._shared.fileno(), size + size_out + size_lse)
        with mmap.mmap(self._shared.fileno(), size + size_out + size_lse) as memory:
            for name, x in host.items():
                start = layout[name][2]
                memory[start : start + x.nbytes] = _bytes_of(x)
            answer = self._ask(
                {
                    "op": "call",
                    "tensors": layout,
                    "scale": call.scale,
                    "path": call.path,
                    "sliding_window": call.sliding_window,
                    "softcap": call.softcap,
                    "device": str(call.q.device),
                    "out_shape": list(out_shape),
                    "out_offset": size,
                    "bytes": size + size_out + size_lse,
                },
                self.limit_s,
            )
            if "failure" in answer:
                raise KernelFailure(answer["failure"], f"{self.function}: {answer['message']}")
            for name, x in host.items():
                start = layout[name][2]
                if memory[start : start + x.nbytes] != _bytes_of(x):
                    raise KernelFailure("wrote-inputs", f"{self.function}: wrote into its input {name}")
            raw = bytearray(memory[size : size + size_out + size_lse])
        numbers = torch.frombuffer(raw, dtype=torch.float32)
        out = numbers[: size_out // 4].view(out_shape)
        lse = numbers[size_out // 4 :].view(out_shape[:3])
        # A foreign kernel does not say how it cut the call: its signature is its code.
        signature = Signature(f"py:{self.file.name}::{self.function}", self.binary, (), (), "one")
        for n_kv, rows in zip(*(x.tolist() for x in call.kv_len.unique(return_counts=True)), strict=True):
            self.trace.record(call.path, n_kv, signature, rows)
        return AttentionOutput(out.to(call.q.device), lse.to(call.q.device))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for stream in (self._to, self._from, self._shared):
            if stream is not None:
                stream.close()
        self._to = self._from = self._shared = None

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        self._shared = tempfile.TemporaryFile(prefix="verify-")  # noqa: SIM115  (closed in `close`)
        child_reads, parent_writes = os.pipe()
        parent_reads, child_writes = os.pipe()
        # -P keeps the worker's own folder off sys.path: the user's modules come first, ours are not found.
        command = [
            sys.executable, "-P", str(FilePath(__file__).with_name("foreign_worker.py")),
            str(child_reads), str(child_writes), str(self._shared.fileno()),
            str(self.file.resolve()), self.function,
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
            pass_fds=(child_reads, child_writes, self._shared.fileno()),
        )
        os.close(child_reads)
        os.close(child_writes)
        self._to = os.fdopen(parent_writes, "wb", buffering=0)
        self._from = os.fdopen(parent_reads, "rb", buffering=0)
        try:
            answer = self._read(START_LIMIT_S)
        except KernelFailure as failure:
            self.close()
            raise SpecError(f"kernel {self.spec!r}: {failure} while it was imported") from None
        if "failure" in answer:
            self.close()
            raise SpecError(f"kernel {self.spec!r}: {answer['message']}")
        self._takes: list[str] = answer["takes"]

    def _ask(self, question: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        if self._process is None or self._to is None:
            raise KernelFailure("died", f"{self.function}: its process has ended")
        for name in _OPTIONAL:
            given = question["tensors"].get(name) if name in ("sinks", "alibi_slopes") else question[name]
            if given is not None and name not in self._takes:
                raise KernelFailure("unsupported", f"{self.function}: does not take {name}, which is needed")
        try:
            self._to.write(json.dumps(question).encode() + b"\n")
        except BrokenPipeError:
            raise self._death() from None
        return self._read(limit_s)

    def _read(self, limit_s: float) -> dict[str, Any]:
        """One line of answer; a process that hangs is killed."""
        assert self._from is not None and self._process is not None
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._from, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(limit_s):
                    self.close()
                    raise KernelFailure("hung", f"{self.function}: no answer within {limit_s:g} s")
                piece = self._from.read(65536)
                if not piece:
                    raise self._death()
                line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> KernelFailure:
        assert self._process is not None
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.close()
        return KernelFailure("died", f"{self.function}: its process was {how}")


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
