"""A user's own kernel, `py:FILE.py::FUNCTION`, run in a process of its own.

    py:WHERE::NAME[(ARGUMENTS)][.METHOD][,option=value,...]

WHERE is a file, alone or in a package, or a module by name; NAME a function, a module's attribute, a static
method (`Class.method`), an object that can be called, or a class, which is constructed with ARGUMENTS.
FUNCTION(q, k, v, *, kv_len, scale[, path, sliding_window, softcap, sinks, alibi_slopes,
         block_table, cu_seqlens, mask, keys])
    -> out or (out, lse), shapes as in `contract`, any float dtype
What it lacks of that is found, or said by the options layout, mask and dtype (`forms`); options that are not
ours are handed to it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from verify.kernels.call import Call
from verify.kernels.catalogue import CALL_LIMIT_S, PYTHON_OPTIONS
from verify.kernels.errors import SpecError
from verify.kernels.foreign.process import WorkerProcess
from verify.kernels.foreign.user_kernel import UserKernel, forms_given, says_several
from verify.kernels.plans.spec import Spec, cache_option, choice, number

_NAME = r"[A-Za-z_]\w*"
_TARGET = re.compile(
    rf"(?P<where>[^()]+?)::(?P<names>{_NAME}(?:\.{_NAME})*)(?P<given>\((?P<arguments>.*)\)(?:\.(?P<method>{_NAME}))?)?"
)
# Options that say how it is called.
FORM_OPTIONS = ("layout", "mask", "dtype")


class Target(NamedTuple):
    """What stands behind `py:`. arguments: of a class that is constructed, None where nothing is."""

    where: str
    names: str
    arguments: dict[str, Any] | None
    method: str

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.names.rpartition(".")[2] if self.arguments is None else self.names


class PythonKernel(UserKernel):
    """A callable of a Python file or module, in its own process."""

    def __init__(
        self,
        spec: str,
        target: Target,
        *,
        limit_s: int,
        acc: str | None,
        p: str | None = None,
        deterministic: bool | None = None,
        row_alone: bool = False,
        wanted: Mapping[str, Any] | None = None,
    ) -> None:
        self.file, self.limit_s = file_of(target.where), limit_s
        code = self.file.read_bytes() if self.file.is_file() else None
        binary = "" if code is None else hashlib.sha256(code).hexdigest()[:12]
        where = str(self.file.resolve()) if is_file(target.where) else target.where
        self._worker = WorkerProcess(
            spec,
            target.name,
            "python_servant.py",
            {**target._asdict(), "where": where, "name": target.name, "wanted": dict(wanted or {})},
        )
        super().__init__(
            spec,
            target.name,
            binary=binary,
            greeting=self._worker.greeting,
            acc=acc,
            p=p,
            deterministic=deterministic,
            row_alone=row_alone,
            knows_several=code is None or says_several(code.decode(errors="replace")),
        )

    @classmethod
    def from_spec(cls, spec: Spec) -> PythonKernel:
        """Raises SpecError, one line, if the file or the function cannot be used."""
        target = parse_target(spec)
        acc = choice(spec, "acc", "f32", ("f32", "f16")) if "acc" in spec.options else None
        p = choice(spec, "p", "f16", ("f32", "f16", "bf16")) if "p" in spec.options else None
        stated = None
        if "deterministic" in spec.options:
            stated = choice(spec, "deterministic", "no", ("yes", "no")) == "yes"
        alone = "row_alone" in spec.options and choice(spec, "row_alone", "bits", ("bits",)) == "bits"
        limit_s = number(spec, "timeout", CALL_LIMIT_S)
        cache = cache_option(spec)
        wanted: dict[str, Any] = {name: spec.options.get(name, "") for name in FORM_OPTIONS}
        own = {name: x for name, x in spec.options.items() if name not in PYTHON_OPTIONS}
        wanted["options"] = {name: literal(x) for name, x in own.items()}
        made = cls(
            spec.text,
            target,
            limit_s=limit_s,
            acc=acc,
            p=p,
            deterministic=stated,
            row_alone=alone,
            wanted=wanted,
        )
        made.cache = cache
        return made

    @property
    def shown(self) -> Mapping[str, Any]:
        return self._worker.said

    @property
    def called(self) -> str:
        return f"py:{self.file.name}::{self.function}"

    def answer(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {"q": call.q, "k": call.k, "v": call.v, "kv_len": call.kv_len.to(torch.int32)}
        for name in ("sinks", "alibi_slopes"):
            if (given := getattr(call, name)) is not None:
                inputs[name] = given.float()
        inputs |= forms_given(call)
        batch, rows, heads = call.q.shape[:3]
        found = self._worker.ask(
            {
                "scale": call.scale,
                "path": self.path_word(call),
                "sliding_window": call.sliding_window,
                "softcap": call.softcap,
                "device": str(call.q.device),
            },
            {name: x.detach().cpu().contiguous() for name, x in inputs.items()},
            {"out": (batch, rows, heads, call.shape.v_size), "lse": (batch, rows, heads)},
            self.limit_s,
        )
        return found["out"].to(call.q.device), found["lse"].to(call.q.device)

    def forgive(self) -> None:
        self._worker.forgive()

    def close(self) -> None:
        self._worker.close()

    def __del__(self) -> None:
        if hasattr(self, "_worker"):
            self.close()


def parse_target(spec: Spec) -> Target:
    """What a specification names. Raises SpecError where it cannot be read, or nothing is there."""
    found = _TARGET.fullmatch(spec.target)
    if found is None:
        raise SpecError(
            f"kernel {spec.text!r}: expected {spec.name}:FILE.py::FUNCTION, or"
            f" {spec.name}:package.module::Class(size=64)"
        )
    where = found["where"]
    if not file_of(where).is_file() and (is_file(where) or not _is_module(where)):
        raise SpecError(f"kernel {spec.text!r}: {where}: no such file")
    arguments = None if found["given"] is None else _arguments(spec, found["arguments"])
    return Target(where, found["names"], arguments, found["method"] or "")


def is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where


def _is_module(where: str) -> bool:
    """Whether a dotted name may be one: the worker imports it, and says what is wrong with it."""
    return all(part.isidentifier() for part in where.split("."))


def file_of(where: str) -> Path:
    """The file of a module by name, as it would be found from the current folder; itself for a file."""
    if is_file(where):
        return Path(where)
    parts = where.split(".")
    for candidate in (Path(*parts).with_suffix(".py"), Path(*parts, "__init__.py")):
        if candidate.is_file():
            return candidate
    # Only the first name is looked up: finding a later one would import what is before it.
    try:
        top = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        top = None
    folders = list(top.submodule_search_locations or ()) if top is not None else []
    for folder in folders:
        inside = Path(folder, *parts[1:])
        for candidate in (inside.with_suffix(".py"), inside / "__init__.py"):
            if candidate.is_file():
                return candidate
    return Path(top.origin) if top is not None and top.origin and len(parts) == 1 else Path(where)


def _arguments(spec: Spec, text: str) -> dict[str, Any]:
    """The keywords of a class that is constructed. Raises SpecError."""
    try:
        called = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(called, ast.Call) and not called.args
        return {str(k.arg): ast.literal_eval(k.value) for k in called.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise SpecError(
            f"kernel {spec.text!r}: ({text}): expected name=value: numbers, words in quotes, True or None"
        ) from None


def literal(text: str) -> Any:
    """A value of an option that is handed on: a number, True, None, a list where it reads as one, else text.

    >>> literal("64"), literal("tanh"), literal("True")
    (64, 'tanh', True)
    """
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
