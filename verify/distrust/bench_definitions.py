"""flashinfer-bench's files: a definition of attention, and a solution of it, made ready to be judged.

A definition (JSON) names inputs, outputs and axes, and holds a `reference`: Python with a function `run`. A
solution names its definition and holds its sources. Either becomes a Python file in a folder of its own, in
which `run` is called as the contract calls a kernel (`verify.kernels.foreign.bench_call`). A definition whose
reference is no attention is refused: there is nothing to judge by.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from verify.kernels.errors import KernelFailure
from verify.kernels.exact import exact_attention
from verify.kernels.foreign import bench_call
from verify.kernels.foreign.python_kernel import PythonKernel
from verify.kernels.heads import Heads
from verify.kernels.judging.families import draw
from verify.kernels.judging.input_sizes import InputSizes
from verify.kernels.numbers import FLOAT_TYPES
from verify.kernels.plans.spec import parse_spec
from verify.machine.errors import UsageError

PAGED = frozenset({"q", "k_cache", "v_cache", "kv_indptr", "kv_indices"})
RAGGED = frozenset({"q", "k", "v", "qo_indptr", "kv_indptr"})
OPTIONAL = frozenset({"sm_scale", "kv_last_page_len", "qo_indptr"})
# A right result of a reference: what types of 16 bits leave of it.
NEAR = 0.05
# Folders above a solution's in which a `definitions` folder is looked for.
_FOLDERS_ABOVE = 4


class Definition(NamedTuple):
    """A definition of attention."""

    file: Path  # that it was read from
    name: str  # by which solutions name it
    dtype: str  # of q, k and v
    heads: Heads  # of calls that it holds, of the smaller of its sizes
    reference: str  # Python source
    sizes: dict[str, Any]  # of `bench_call.DefinedCall`, but for `run` and `log2`


class ToJudge(NamedTuple):
    """spec: of the kernel; shape: heads that the definition holds; dtype: of its inputs."""

    spec: str
    shape: str
    dtype: str


def is_of_bench(target: str) -> bool:
    """Whether a target is a definition or a solution."""
    return target.partition("::")[0].removeprefix("py:").endswith(".json")


@contextmanager
def to_judge(target: str, definition: str | None) -> Iterator[ToJudge]:
    """A definition's reference, a solution, or a function FILE.py[::NAME] (run) of a definition.

    Raises UsageError naming file and field; SpecError where a file cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="verify-judge-") as made:
        folder = Path(made)
        if is_of_bench(target):
            file = Path(target)
            read = _json(file)
            if "reference" in read:
                defined = _definition(file, read)
                (folder / "reference_run.py").write_text(defined.reference, encoding="utf-8")
                source, function = folder / "reference_run.py", "run"
            else:
                defined = _definition_of(file, read, definition)
                source, function = _written(file, read, folder)
        else:
            assert definition is not None
            where, _, name = target.removeprefix("py:").partition("::")
            source, function = Path(where).resolve(), name or "run"
            if not source.is_file():
                raise UsageError(f"{where}: no such file")
            defined = _definition(Path(definition), _json(Path(definition)))
        log2 = _log2_of_reference(defined, folder)
        spec = _adapted(folder, "verify_judged", source, function, {**defined.sizes, "log2": log2})
        h = defined.heads
        yield ToJudge(f"{spec},dtype={defined.dtype}", f"{h.q}/{h.kv}x{h.k_size}", defined.dtype)


def _json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"{file}: is no JSON: {error}") from None
    if not isinstance(read, dict):
        raise UsageError(f"{file}: expected an object, a definition or a solution of flashinfer-bench")
    return read


def _field(file: Path, of: dict[str, Any], name: str, kind: type, within: str = "") -> Any:
    """Raises UsageError where it is not there, or of another kind."""
    if not isinstance(of.get(name), kind):
        words = "an object" if kind is dict else "a text" if kind is str else "a list"
        raise UsageError(f"{file}: {within}{name}: expected {words}, got {json.dumps(of.get(name))[:40]}")
    return of[name]


def _definition(file: Path, read: dict[str, Any]) -> Definition:
    """Raises UsageError."""
    inputs, outputs, axes = (_field(file, read, name, dict) for name in ("inputs", "outputs", "axes"))
    reference = _field(file, read, "reference", str)
    names = set(inputs)
    kind = next((k for k in (PAGED, RAGGED) if k <= names <= k | OPTIONAL), None)
    if kind is None:
        raise UsageError(
            f"{file}: inputs: {', '.join(inputs)} are not those of attention as it is known here: q,"
            " k_cache, v_cache, kv_indptr, kv_indices (qo_indptr, kv_last_page_len), or q, k, v, qo_indptr,"
            " kv_indptr"
        )
    if not 1 <= len(outputs) <= 2:
        raise UsageError(f"{file}: outputs: expected a result and its lse, got {', '.join(outputs)}")

    def size_of(name: str, at: int) -> int:
        shape = _field(file, _field(file, inputs, name, dict, "inputs."), "shape", list, f"inputs.{name}.")
        axis = shape[at] if -len(shape) <= at < len(shape) else None
        found = axes.get(axis, {}) if isinstance(axis, str) else {"value": axis}
        value = found.get("value") if isinstance(found, dict) else None
        if not isinstance(value, int) or value < 1:
            raise UsageError(f"{file}: axes.{axis}: expected a constant, a whole number from 1")
        return value

    keys, values = ("k_cache", "v_cache") if kind is PAGED else ("k", "v")
    heads, kv_heads, k_size, v_size = (
        size_of("q", -2), size_of(keys, -2), size_of(keys, -1), size_of(values, -1),
    )  # fmt: skip
    if heads % kv_heads:
        raise UsageError(f"{file}: axes: {heads} query heads are no multiple of {kv_heads} KV heads")
    dtypes = {kind.torch_name: name for name, kind in FLOAT_TYPES.items()}
    dtype = dtypes.get(str(inputs["q"].get("dtype")))
    if dtype is None:
        raise UsageError(f"{file}: inputs.q.dtype: expected one of {', '.join(dtypes)}")
    size = min(k_size, v_size)
    return Definition(
        file=file,
        name=str(read.get("name", file.stem)),
        dtype=dtype,
        heads=Heads(heads, kv_heads, size, size),
        reference=reference,
        sizes={
            "inputs": list(inputs),
            "outputs": list(outputs),
            "heads": heads,
            "kv_heads": kv_heads,
            "k_size": k_size,
            "v_size": v_size,
            "page": size_of(keys, -3) if kind is PAGED else 0,
        },
    )


def _definition_of(file: Path, solution: dict[str, Any], given: str | None) -> Definition:
    """The definition that a solution is of: the one given, or in the set of files that it lies in."""
    name = _field(file, solution, "definition", str)
    found = [Path(given)] if given else []
    for above in list(file.resolve().parents)[:_FOLDERS_ABOVE]:
        found += sorted((above / "definitions").rglob(f"{name}.json"))
    if not found:
        raise UsageError(f"{file}: definition: no {name}.json lies beside it; --definition FILE names it")
    defined = _definition(found[0], _json(found[0]))
    if defined.name != name:
        raise UsageError(f"{file}: definition: {name}, and {found[0]} is {defined.name}")
    return defined


def _written(file: Path, solution: dict[str, Any], folder: Path) -> tuple[Path, str]:
    """Its sources as files, and where its function is."""
    spec = _field(file, solution, "spec", dict)
    entry = _field(file, spec, "entry_point", str, "spec.")
    for i, source in enumerate(_field(file, solution, "sources", list)):
        within = f"sources[{i}]."
        path = PurePosixPath(_field(file, source, "path", str, within))
        if path.is_absolute() or ".." in path.parts:
            raise UsageError(f"{file}: {within}path: expected one within its folder, got {str(path)!r}")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(_field(file, source, "content", str, within), encoding="utf-8")
    where, _, function = entry.partition("::")
    if not where.endswith(".py") or not function or not (folder / where).is_file():
        raise UsageError(
            f"{file}: spec.entry_point: expected FILE.py::FUNCTION of its sources, got {entry!r}"
        )
    return folder / where, function


_ADAPTER = '''"""Made by `verify judge`: {function} of {source}, as the contract calls a kernel."""

import importlib.util
import sys


def _loaded(name, file):
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, {folder!r})
attend = _loaded("verify_bench_call", {caller!r}).DefinedCall(
    run=_loaded({module!r}, {source!r}).{function}, **{sizes!r}
)
'''


def _adapted(folder: Path, name: str, source: Path, function: str, sizes: dict[str, Any]) -> str:
    """The specification of a function behind a file that calls it."""
    if not function.isidentifier():
        raise UsageError(f"{source.name}::{function}: expected the name of a function")
    text = _ADAPTER.format(
        function=function,
        source=str(source),
        folder=str(source.parent),
        caller=str(Path(str(bench_call.__file__)).resolve()),
        module=source.stem,
        sizes=sizes,
    )
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return f"py:{folder / name}.py::attend"


def _log2_of_reference(defined: Definition, folder: Path) -> bool:
    """Whether the reference's lse is in powers of two. Raises UsageError where it is no attention."""
    (folder / "its_reference.py").write_text(defined.reference, encoding="utf-8")
    sizes = {**defined.sizes, "log2": False}
    spec = _adapted(folder, "verify_reference", folder / "its_reference.py", "run", sizes)
    call = draw(
        "gaussian",
        InputSizes(n_kv=(64, 32), heads=defined.heads, edges=(), dtype=FLOAT_TYPES[defined.dtype].dtype),
        0,
    )
    exact = exact_attention(call)
    kernel = PythonKernel.from_spec(parse_spec(f"{spec},dtype={defined.dtype}"))
    try:
        result = kernel.run(call)
    except KernelFailure as failure:
        raise UsageError(f"{defined.file}: reference: it fails on a call of two tokens: {failure}") from None
    finally:
        kernel.close()
    off = float((result.out.double() - exact.out).abs().max())
    if not off < NEAR:
        raise UsageError(
            f"{defined.file}: reference: it is not attention of these inputs, {off:.2g} off:"
            " nothing to judge by"
        )
    natural, binary = (
        float((result.lse.double() * unit - exact.lse).abs().nan_to_num(math.inf).max())
        for unit in (1.0, math.log(2))
    )
    return binary < natural or bool(torch.isnan(result.lse).all())
