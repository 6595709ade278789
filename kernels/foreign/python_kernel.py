"""A user's own kernel, `py:FILE.py::FUNCTION`, run in a process of its own.

FUNCTION(q, k, v, *, kv_len, scale[, path, sliding_window, softcap, sinks, alibi_slopes])
    -> out or (out, lse), shapes as in `contract`, any float dtype
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
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
# From so many keys on gamma_2n of float16 sums is 1/8: the budget of a kernel with unknown sums says nothing.
VACUOUS_KEYS = 128


class PythonKernel(Kernel):
    """A function of a Python file, in its own process."""

    def __init__(
        self,
        spec: str,
        file: Path,
        function: str,
        *,
        limit_s: int,
        acc: str | None,
        deterministic: bool | None = None,
    ) -> None:
        super().__init__(spec)
        self.deterministic = deterministic
        self.file, self.function, self.limit_s, self.acc = file, function, limit_s, acc
        self.binary = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        self._worker = WorkerProcess(
            spec, function, "python_servant.py", {"file": str(file.resolve()), "function": function}
        )
        self._takes: list[str] = self._worker.greeting["takes"]
        left_out: dict[str, str] = self._worker.greeting["left_out"]
        if left_out:
            why = ", ".join(f"{name} ({reason})" for name, reason in left_out.items())
            self.notes.append(f"{spec}: does not say what it takes; asked, it does not take {why}: left out")

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
        stated = None
        if "deterministic" in spec.options:
            stated = choice(spec, "deterministic", "no", ("yes", "no")) == "yes"
        limit_s = number(spec, "timeout", CALL_LIMIT_S)
        return cls(spec.text, file, function, limit_s=limit_s, acc=acc, deterministic=stated)

    def arithmetic(self, shape: Shape, path: AttentionPath) -> Arithmetic:
        return self._returning(loosest("f16", acc=self.acc))

    def arithmetic_of(self, call: Call) -> Arithmetic:
        return self._returning(loosest_of(call.q.dtype, acc=self.acc))

    def _returning(self, assumed: Arithmetic) -> Arithmetic:
        """The type that came back is known; a float32 that came back may hold numbers of a narrower one."""
        came_back = RESULT_TYPES.get(self._worker.said.get("dtype", ""))
        return assumed if came_back is None else replace(assumed, out=came_back)

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
            deterministic=bool(self.deterministic),
            row_alone=False,
            strided=False,
            zero_for_empty_rows=False,
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
        self._say_what_is_vacuous(call)
        # A foreign kernel does not say how it cut the call: its signature is its code.
        signature = Signature(f"py:{self.file.name}::{self.function}", self.binary, (), (), "one")
        launched = Launched.every_row(call.path, call.kv_len, signature)
        return Result(found["out"].to(call.q.device), found["lse"].to(call.q.device), launched)

    def _say_what_is_vacuous(self, call: Call) -> None:
        """Once, that no budget applies, and what to state."""
        vacuous = self.acc is None and call.q.dtype != torch.bfloat16
        if vacuous and call.kv_len.numel() and int(call.kv_len.max()) >= VACUOUS_KEYS:
            note = (
                f"{self.spec}: nothing is stated of its sums, so from {VACUOUS_KEYS} keys on no rounding"
                " budget applies; add acc=f32 to the specification if it accumulates in float32"
            )
            if note not in self.notes:
                self.notes.append(note)

    def forgive(self) -> None:
        self._worker.forgive()

    def close(self) -> None:
        self._worker.close()

    def __del__(self) -> None:
        if hasattr(self, "_worker"):
            self.close()
