"""A user's own kernel, `py:FILE.py::FUNCTION`, run in a process of its own.

FUNCTION(q, k, v, *, kv_len, scale[, path, sliding_window, softcap, sinks, alibi_slopes])
    -> out or (out, lse), shapes as in `contract`, any float dtype
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from verify.kernels.budget.arithmetic import Arithmetic, loosest, loosest_of
from verify.kernels.call import AttentionPath, Call, Result, Shape
from verify.kernels.capabilities import Capabilities
from verify.kernels.catalogue import CALL_LIMIT_S
from verify.kernels.errors import KernelFailure, SpecError
from verify.kernels.foreign.process import WorkerProcess
from verify.kernels.kernel import Kernel
from verify.kernels.plans.spec import Spec, choice, number
from verify.kernels.trace import Launched, Signature

# What a function is given only if it asks for it; without it, a call that needs it is refused.
_OPTIONAL = ("sliding_window", "softcap", "sinks", "alibi_slopes")


# What torch calls them; of any other type a result is judged as float32.
RESULT_TYPES = {"float16": "f16", "bfloat16": "bf16"}


class PythonKernel(Kernel):
    """A function of a Python file, in its own process."""

    def __init__(self, spec: str, file: Path, function: str, *, limit_s: int, acc: str | None) -> None:
        super().__init__(spec)
        self.file, self.function, self.limit_s, self.acc = file, function, limit_s, acc
        self.binary = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        self._worker = WorkerProcess(
            spec, function, "python_servant.py", {"file": str(file.resolve()), "function": function}
        )
        self._takes: list[str] = self._worker.greeting["takes"]

    @classmethod
    def from_spec(cls, spec: Spec) -> PythonKernel:
        """Raises SpecError, one line, if the file or the function cannot be used."""
        path, separator, function = spec.target.rpartition("::")
        if not separator or not function.isidentifier():
            raise SpecError(f"kernel {spec.text!r}: expected py:FILE.py::FUNCTION")
        file = Path(path)
        if not file.is_file():
            raise SpecError(f"kernel {spec.text!r}: {path}: no such file")
        acc = choice(spec, "acc", "f32", ("f32", "f16")) if "acc" in spec.options else None
        return cls(spec.text, file, function, limit_s=number(spec, "timeout", CALL_LIMIT_S), acc=acc)

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return loosest("f16", acc=self.acc)

    def arithmetic_of(self, call: Call) -> Arithmetic:
        return loosest_of(call.q.dtype, acc=self.acc)

    def result_type(self, call: Call) -> str:
        return RESULT_TYPES.get(self._worker.said.get("dtype", ""), "f32")

    def capabilities(self) -> Capabilities:
        # Whether it returns the lse, it shows when it runs: until then it is taken to.
        return Capabilities(
            lse=self._worker.said.get("lse", True),
            sliding_window="sliding_window" in self._takes,
            softcap="softcap" in self._takes,
            sinks="sinks" in self._takes,
            alibi="alibi_slopes" in self._takes,
            plans=False,
            head_groups=False,
            row_alone=False,
            strided=False,
        )

    def run(self, call: Call) -> Result:
        for name in _OPTIONAL:
            if getattr(call, name) is not None and name not in self._takes:
                raise KernelFailure("unsupported", f"{self.function}: does not take {name}, which is needed")
        inputs = {"q": call.q, "k": call.k, "v": call.v, "kv_len": call.kv_len.to(torch.int32)}
        for name in ("sinks", "alibi_slopes"):
            if (given := getattr(call, name)) is not None:
                inputs[name] = given.float()
        batch, rows, heads = call.q.shape[:3]
        found = self._worker.ask(
            {
                "scale": call.scale,
                "path": call.path,
                "sliding_window": call.sliding_window,
                "softcap": call.softcap,
                "device": str(call.q.device),
            },
            {name: x.detach().cpu().contiguous() for name, x in inputs.items()},
            {"out": (batch, rows, heads, call.shape.v_size), "lse": (batch, rows, heads)},
            self.limit_s,
        )
        # A foreign kernel does not say how it cut the call: its signature is its code.
        signature = Signature(f"py:{self.file.name}::{self.function}", self.binary, (), (), "one")
        launched = Launched.every_row(call.path, call.kv_len, signature)
        return Result(found["out"].to(call.q.device), found["lse"].to(call.q.device), launched)

    def forgive(self) -> None:
        self._worker.forgive()

    def close(self) -> None:
        self._worker.close()

    def __del__(self) -> None:
        if hasattr(self, "_worker"):
            self.close()
