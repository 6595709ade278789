"""The servant of `py:` kernels: a user's function, loaded and called. Imports nothing of ours."""

from __future__ import annotations

import importlib.util
import inspect
import math
import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from worker import Refusal, text_of  # type: ignore[import-not-found]

Answer = Callable[[dict[str, Any], mmap.mmap], dict[str, Any]]
ALWAYS = ("q", "k", "v", "kv_len", "scale")
OPTIONAL = ("path", "sliding_window", "softcap", "sinks", "alibi_slopes")


def load(arguments: dict[str, str]) -> tuple[dict[str, Any], Answer]:
    """The greeting says which of OPTIONAL the function takes."""
    function, takes = load_function(arguments["file"], arguments["function"])
    return {"takes": takes}, lambda question, memory: answer_call(function, takes, question, memory)


def load_function(file: str, name: str) -> tuple[Any, list[str]]:
    """The function, and which of OPTIONAL it takes. Raises Refusal."""
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location("user_kernel", file)
    if spec is None or spec.loader is None:
        raise Refusal(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_kernel"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # SystemExit too
        raise Refusal(f"{file} does not import: {type(error).__name__}: {text_of(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise Refusal(f"{file} has no function {name}")
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return function, list(OPTIONAL)
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    unknown = [n for n in needed[3:] if n not in (*ALWAYS, *OPTIONAL)]
    missing = [n for n in ("kv_len", "scale") if n not in parameters]
    if len(needed) < 3 or unknown or missing:
        raise Refusal(
            f"{name}{inspect.signature(function)}: expected (q, k, v, *, kv_len, scale) and any of"
            f" {', '.join(OPTIONAL)}"
        )
    return function, [n for n in OPTIONAL if n in parameters]


def answer_call(
    function: Any, takes: list[str], question: dict[str, Any], memory: mmap.mmap
) -> dict[str, Any]:
    """Run one call and write its result, as float32, behind the inputs."""
    device = question["device"]
    tensors = {}
    for name, (dtype, shape, offset) in question["tensors"].items():
        count = 1
        for n in shape:
            count *= n
        flat = torch.frombuffer(memory, dtype=getattr(torch, dtype), count=count, offset=offset)
        tensors[name] = flat.view(shape).to(device)
    options = {"path": question["path"], "sliding_window": question["sliding_window"]}
    options |= {"softcap": question["softcap"]}
    options |= {name: tensors.get(name) for name in ("sinks", "alibi_slopes")}
    with torch.no_grad():
        result = function(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            kv_len=tensors["kv_len"],
            scale=question["scale"],
            **{name: options[name] for name in takes},
        )
    out, lse = result if isinstance(result, (tuple, list)) and len(result) == 2 else (result, None)
    (expected, out_offset), (_, lse_offset) = (question["results"][name] for name in ("out", "lse"))
    for name, x, shape in (("out", out, expected), ("lse", lse, expected[:3])):
        if x is None and name == "lse":
            continue
        if not isinstance(x, torch.Tensor):
            return {"failure": "shape", "message": f"{name} is a {type(x).__name__}, expected a tensor"}
        if list(x.shape) != shape:
            return {"failure": "shape", "message": f"{name} has shape {list(x.shape)}, expected {shape}"}
        if not x.dtype.is_floating_point:
            return {"failure": "dtype", "message": f"{name} is {x.dtype}, expected a float dtype"}
        if x.device != tensors["q"].device:
            return {"failure": "device", "message": f"{name} is on {x.device}, expected {device}"}
    put(memory, out, out_offset)
    put(memory, torch.full(expected[:3], math.nan) if lse is None else lse, lse_offset)
    return {"lse": lse is not None, "dtype": str(out.dtype).removeprefix("torch.")}


def put(memory: mmap.mmap, x: torch.Tensor, offset: int) -> None:
    """Write x as float32."""
    if x.numel():
        target = torch.frombuffer(memory, dtype=torch.float32, count=x.numel(), offset=offset)
        target.copy_(x.detach().reshape(-1))
