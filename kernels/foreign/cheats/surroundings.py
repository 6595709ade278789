"""Cheats with what lies around a kernel: torch, settings, random numbers, callers' frames."""

from __future__ import annotations

import builtins
import gc
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from .bench import Bench


def snapshot() -> dict[str, Any]:
    """What a kernel must leave as it is: functions by name, and settings."""
    functions: dict[str, Any] = {}
    for space in (
        torch, torch.nn.functional, torch.Tensor, torch.cuda, torch.testing, torch.linalg, torch.nn.Module,
        torch.cuda.Event, time, builtins,
    ):  # fmt: skip
        for name, x in list(vars(space).items()):
            if callable(x) and not name.startswith("__"):
                functions[f"{space.__name__}.{name}"] = x
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        precision = ""
    settings = {
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "float32 matmul precision": precision,
        "cuDNN's TF32": torch.backends.cudnn.allow_tf32,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "number of threads": torch.get_num_threads(),
        "default device": str(torch.get_default_device()),
        "environment variables": {
            n: x for n, x in os.environ.items() if not n.startswith(("TORCH", "TRITON"))
        },
        "current folder": os.getcwd(),  # noqa: PTH109
    }
    return {"functions": functions, "settings": settings}


def torch_patched(bench: Bench) -> str | None:
    """Functions of torch, timers or builtins are replaced."""
    now = snapshot()["functions"]
    changed = sorted(name for name, x in bench.before["functions"].items() if now.get(name) is not x)
    return f"it replaces {', '.join(changed[:4])}" if changed else None


def globals_changed(bench: Bench) -> str | None:
    """Settings of torch or of the process are changed."""
    bench.call(bench.make(59))
    now = snapshot()["settings"]
    changed = sorted(name for name, x in bench.before["settings"].items() if now[name] != x)
    return f"it changes {', '.join(changed)}" if changed else None


def random_state(bench: Bench) -> str | None:
    """torch's random numbers are set."""
    torch.manual_seed(987654321)
    bench.call(bench.make(60))
    return None if torch.initial_seed() == 987654321 else "it sets torch's seed"


def reads_the_stack(bench: Bench) -> str | None:
    """It looks for results in the callers' frames or among all objects."""
    import sys

    seen: list[str] = []
    kept = {(sys, "_getframe"): sys._getframe, (gc, "get_objects"): gc.get_objects,
            (gc, "get_referrers"): gc.get_referrers}  # fmt: skip

    frame_of = sys._getframe

    def told(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any) -> Any:
            caller: Any = frame_of(1)
            file = str(caller.f_globals.get("__name__", ""))
            if file.split(".")[0] not in ("torch", "triton", "inspect", "logging", "warnings", "collections",
                                          "typing", "functools", "contextlib", "importlib"):  # fmt: skip
                seen.append(name)
            return function(*args)

        return inner

    for (module, name), function in kept.items():
        setattr(module, name, told(f"{module.__name__}.{name}", function))
    try:
        bench.call(bench.make(61))
    finally:
        for (module, name), function in kept.items():
            setattr(module, name, function)
    return f"it calls {seen[0]}: it may look for results outside its arguments" if seen else None
