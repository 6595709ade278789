"""A callable out of a file, a package or a module, by its name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .form import FormError, text_of


def load_callable(
    where: str, names: str, *, arguments: Mapping[str, Any] | None = None, method: str = ""
) -> Callable[..., Any]:
    """The callable NAMES (dotted) of a file or module; arguments: of a class that is to be constructed.

    Raises FormError.
    """
    module = load_module(where)
    found: Any = module
    for name in names.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            known = [x for x in dir(found) if not x.startswith("_")]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f", did you mean {near[0]}?" if near else ""
            raise FormError(f"{where} has no function {names}{hint}") from None
    if isinstance(found, type):
        try:
            # Files of benchmarks say what their classes are constructed with.
            inits = getattr(module, "get_init_inputs", None)
            if arguments is None and callable(inits):
                found = found(*inits())
            else:
                found = found(**(arguments or {}))
        except Exception as error:
            raise FormError(
                f"{names} must be constructed, and {names}({_written(arguments or {})}) fails:"
                f" {type(error).__name__}: {error}"
            ) from error
    elif arguments is not None:
        raise FormError(f"{names} is no class: options of a function stand after a comma, {names},block=64")
    if method:
        found = getattr(found, method, None)
    if not callable(found):
        raise FormError(f"{where} has no function {'.'.join(filter(None, (names, method)))}")
    return found


def _written(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={x!r}" for name, x in arguments.items())


def load_module(where: str) -> Any:
    """A file, alone or as a part of the package that it lies in, or a module by name. Raises FormError."""
    file = Path(where)
    if file.suffix == ".py" or "/" in where:
        if not (file.parent / "__init__.py").is_file():
            return _load_file(file)
        parts = [file.stem]
        folder = file.resolve().parent
        while (folder / "__init__.py").is_file():
            parts.insert(0, folder.name)
            folder = folder.parent
        path, name = str(folder), ".".join(parts)
    else:
        path, name = str(Path.cwd()), where
    if path not in sys.path:
        sys.path.insert(0, path)
    try:
        return importlib.import_module(name)
    except BaseException as error:  # SystemExit too
        raise FormError(f"{where} does not import: {type(error).__name__}: {text_of(error)}") from error


def _load_file(file: Path) -> Any:
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location("user_kernel", file)
    if spec is None or spec.loader is None:
        raise FormError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_kernel"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        raise FormError(f"{file} does not import: {type(error).__name__}: {text_of(error)}") from error
    return module
