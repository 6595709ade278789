"""What a caller of the library gives, as experiments take it: kernels, shapes, lengths, types, paths."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from verify.kernels.budget.arithmetic import Arithmetic
from verify.kernels.call import PATHS, RUN_PATHS, AttentionPath
from verify.kernels.foreign.forms import Wanted
from verify.kernels.foreign.function_kernel import FunctionKernel, name_of_callable
from verify.kernels.kernel import Kernel
from verify.kernels.numbers import FLOAT_TYPES, type_of
from verify.kernels.registry import build_kernel
from verify.machine.errors import UsageError

# A head shape with shared heads.
DEFAULT_SHAPES, ONE_HEAD_EACH = ("4/2x64",), ("4/4x64",)


def kernel_of(
    fn: Callable[..., Any] | str, wanted: Wanted, stated: Arithmetic | str | None, *, isolate: bool = False
) -> Kernel:
    """The kernel of a callable or a specification. isolate: in a process of its own. Raises UsageError,
    SpecError."""
    if isolate and not isinstance(fn, str):
        fn = _specification(fn, wanted, stated)
    if isinstance(fn, str):
        return build_kernel(fn)
    acc = stated if isinstance(stated, str) else None
    return FunctionKernel(fn, wanted=wanted, acc=acc, stated=None if isinstance(stated, str) else stated)


def _specification(fn: Callable[..., Any], wanted: Wanted, stated: Arithmetic | str | None) -> str:
    """The specification of a function that another process can import. Raises UsageError."""
    name, module = name_of_callable(fn), inspect.getmodule(fn)
    file = getattr(module, "__file__", None)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if file is None or found is not fn:
        raise UsageError(
            f"isolate=True: {name} cannot be imported by another process: expected a function, class method"
            " or object at the top level of a module that is a file"
        )
    if isinstance(stated, Arithmetic):
        raise UsageError("isolate=True: arithmetic: expected f32, f16 or nothing")
    parts = {"layout": wanted.layout, "mask": wanted.mask, "acc": stated or ""}
    given = {**{key: x for key, x in parts.items() if x}, **wanted.options}
    return ",".join([f"py:{Path(file)}::{name}", *(f"{key}={x}" for key, x in given.items())])


def shapes_of(shapes: Sequence[str] | str | None, kernel: Kernel) -> tuple[str, ...]:
    if shapes is None:
        return ONE_HEAD_EACH if kernel.capabilities().ratios == (1,) else DEFAULT_SHAPES
    return (shapes,) if isinstance(shapes, str) else tuple(shapes)


def lengths_of(n_kv: Sequence[int] | int) -> tuple[int, ...]:
    """Raises UsageError."""
    lengths = (n_kv,) if isinstance(n_kv, int) else tuple(n_kv)
    if not lengths or min(lengths) < 1:
        raise UsageError(f"n_kv={n_kv}: expected lengths from 1")
    return lengths


def dtype_of(dtype: str | torch.dtype | None, kernel: Kernel) -> str:
    """Raises UsageError."""
    if dtype is None:
        has = kernel.capabilities().dtypes
        return next(name for name, kind in FLOAT_TYPES.items() if kind.torch_name in has)
    kind = type_of(dtype) if isinstance(dtype, torch.dtype) else FLOAT_TYPES.get(dtype)
    if kind is None:
        raise UsageError(f"dtype={dtype}: expected one of {', '.join(FLOAT_TYPES)}")
    return kind.name


def paths_of(paths: Sequence[AttentionPath] | AttentionPath | None, kernel: Kernel) -> list[AttentionPath]:
    """Raises UsageError."""
    has = kernel.capabilities().paths
    if paths is None:
        return [path for path in RUN_PATHS if path in has]
    asked = [paths] if isinstance(paths, str) else list(paths)
    for path in asked:
        if path not in PATHS:
            raise UsageError(f"paths: {path!r}: expected decode, several or prefill")
    if not asked:
        raise UsageError("paths: expected at least one of decode, several, prefill")
    return asked


def name_of(fn: Callable[..., Any] | str) -> str:
    return fn if isinstance(fn, str) else name_of_callable(fn)
