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
    """The greeting says which of OPTIONAL the function takes; where it had to be asked, why not others."""
    function, takes, left_out = load_function(arguments["file"], arguments["function"])
    return {"takes": takes, "left_out": left_out}, lambda question, memory: answer_call(
        function, takes, question, memory
    )


def load_function(file: str, name: str) -> tuple[Any, list[str], dict[str, str]]:
    """The function, which of OPTIONAL it takes, and why not the others if it was asked. Raises Refusal."""
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
    # A module's call takes anything and hands it to `forward`.
    stated = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        parameters = inspect.signature(stated).parameters
    except (TypeError, ValueError):
        # Built in, or an operator: it does not say what it takes.
        return ask_function(function)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return ask_function(function)
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    unknown = [n for n in needed[3:] if n not in (*ALWAYS, *OPTIONAL)]
    missing = [n for n in ("kv_len", "scale") if n not in parameters]
    if len(needed) < 3 or unknown or missing:
        raise Refusal(
            f"{name}{inspect.signature(stated)}: expected (q, k, v, *, kv_len, scale) and any of"
            f" {', '.join(OPTIONAL)}"
        )
    return function, [n for n in OPTIONAL if n in parameters], {}


def ask_function(function: Any) -> tuple[Any, list[str], dict[str, str]]:
    """What a function takes that does not say so: a small call with each of OPTIONAL, and one without.

    An option that it raises on, or that changes nothing though it must, is not taken. A function without
    keywords is given kv_len and scale by position. Where it fails without any option, calls will show why.
    """

    def by_position(q: Any, k: Any, v: Any, *, kv_len: Any, scale: float, **options: Any) -> Any:
        return function(q, k, v, kv_len, scale, **options)

    def out_of(called: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
        with torch.no_grad():
            result = called(inputs["q"], inputs["k"], inputs["v"], kv_len=inputs["kv_len"],
                            scale=0.125, **options)  # fmt: skip
        return result[0] if isinstance(result, (tuple, list)) else result

    failure = ""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        inputs = small_inputs(device)
        for called in (function, by_position):
            try:
                plain = out_of(called, inputs)
            except Exception as error:
                failure = failure or f"fails when it is asked: {type(error).__name__}: {text_of(error)}"
                continue
            takes, left_out = [], {}
            for name, value in inputs["options"].items():
                try:
                    changed = not torch.equal(out_of(called, inputs, **{name: value}), plain)
                except Exception as error:
                    left_out[name] = type(error).__name__
                    continue
                if changed or name == "path":
                    takes.append(name)
                else:
                    left_out[name] = "ignored"
            return called, takes, left_out
    return function, [], dict.fromkeys(OPTIONAL, failure)


def small_inputs(device: str) -> dict[str, Any]:
    """A call of two rows over 16 keys on which each of OPTIONAL changes the result."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, h, 64, generator=g).half().to(device) for n, h in ((2, 2), (16, 1), (16, 1)))
    kv_len = torch.tensor([[16, 11]], dtype=torch.int32, device=device)
    per_head = torch.ones(2, device=device)
    options = {"path": "decode", "sliding_window": 3, "softcap": 0.5, "sinks": 3 * per_head}
    return {"q": q, "k": k, "v": v, "kv_len": kv_len, "options": options | {"alibi_slopes": 0.5 * per_head}}


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
